"""Kinds of text cut out of the running Python's library: code, docstrings, tests."""

import ast
import io
import tokenize

from gemscope import miniature
from gemscope.errors import InputError
from gemscope.miniature import Document

PRESETS = ("code", "docstrings", "tests")
"""Names of these texts; `python:code` and so on are the same."""

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_preset(name: str) -> list[Document]:
    """The documents of a preset: library modules as code alone, or as their docstrings alone, or
    the library's test modules as they are.
    """
    if name == "tests":
        found = miniature.documents("tests")
        if not found:
            raise InputError("this Python came without its test modules; give a folder of tests")
        return found
    cut = _code if name == "code" else _docstrings
    made = [Document(d.path, cut(d.text)) for d in miniature.documents("library")]
    return [d for d in made if d.text.strip()]


def _docstrings(text: str) -> str:
    """The docstrings of a module, without what quotes them, in order, a blank line between."""
    return "\n\n".join(
        ast.get_docstring(node, clean=True) or "" for node, _ in _documented(text)
    )  # fmt: skip


def _code(text: str) -> str:
    """A module without docstrings and comments."""
    spans = [(c.lineno, c.end_lineno or c.lineno) for _, c in _documented(text)]
    lines: list[str | None] = list(text.splitlines(keepends=True))
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return ""
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            kept = (lines[row - 1] or "")[:column].rstrip()
            lines[row - 1] = f"{kept}\n" if kept else None
    for first, last in spans:
        lines[first - 1 : last] = [None] * (last - first + 1)
    return "".join(line for line in lines if line is not None)


def _documented(text: str) -> list[tuple[_Documented, ast.expr]]:
    """What has a docstring, and the expression that is it."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    found: list[tuple[_Documented, ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            found.append((node, first.value))
    return sorted(found, key=lambda pair: pair[1].lineno)
