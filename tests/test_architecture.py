"""The structure: imports point one way, importing costs nothing, folders show their face."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "gemscope"
ROOT = PACKAGE.parents[1]
# Each may import those before it.
LAYERS = (
    "errors", "miniature", "sites", "corpus", "sae", "formats", "hub", "lm", "activations",
    "evaluate", "train", "features", "relate", "explain", "exchange", "steering",
    "circuits", "explorer", "cli",
)  # fmt: skip
HEAVY = {"torch", "transformers", "matplotlib", "pydantic", "numpy", "rich", "huggingface_hub"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file):
    """`(module, names)` of every import of ours in `file`, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "gemscope":
                for name in node.names:
                    yield f"gemscope.{name.name}"
            elif node.module.startswith("gemscope."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (n.name for n in node.names if n.name.startswith("gemscope."))


def test_every_folder_is_a_layer():
    found = {layer_of(f) for f in sources()} - {"__init__", "__main__"}
    assert found == set(LAYERS)


def test_imports_point_one_way():
    for file in sources():
        layer = layer_of(file)
        if layer in ("__init__", "__main__"):
            continue
        for module in imported(file):
            used = module.split(".")[1]
            if used in ("__version__",):
                continue
            assert LAYERS.index(used) < LAYERS.index(layer), f"{file} imports {module}"


def test_nobody_reaches_into_another_layers_files():
    for file in sources():
        for module in imported(file):
            assert not re.search(r"\._(?!_version__)", module), f"{file} imports {module}"


def test_pure_layers_stay_pure():
    for layer in ("errors.py", "sites", "miniature"):
        files = [PACKAGE / layer] if layer.endswith(".py") else (PACKAGE / layer).rglob("*.py")
        for file in files:
            assert "torch" not in file.read_text("utf-8").replace("Taps", ""), file


def loaded_by(statement):
    probe = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return HEAVY & {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import gemscope",
        "import gemscope.cli",
        "import gemscope.hub",
        "from gemscope.cli import main; main(['list', '--json'])",
        "from gemscope.cli import main; main(['info', 'nothing'])",
    ],
)
def test_importing_and_listing_load_nothing_heavy(statement):
    # Running a command, typer uses pydantic where it is installed; that costs 20 ms.
    allowed = {"pydantic"} if "main(" in statement else set()
    assert loaded_by(statement) <= allowed


def seconds(*arguments):
    best = 10.0
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        best = min(best, time.perf_counter() - began)
    return best


def test_import_and_help_are_fast():
    bare = seconds("-c", "pass")
    assert seconds("-c", "import gemscope") - bare < 0.1
    assert seconds("-m", "gemscope", "--help") < 0.4


def test_the_face_of_the_package_is_whole():
    import gemscope

    for name in gemscope.__all__:
        assert getattr(gemscope, name) is not None
        assert name in dir(gemscope)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gemscope.nothing


def test_files_and_functions_stay_small():
    for file in sources():
        text = file.read_text("utf-8")
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno
                assert lines <= 60, f"{file}:{node.name} has {lines} lines"


def test_no_pickle_and_no_autocast():
    for file in sources():
        text = file.read_text("utf-8")
        assert not re.search(r"\bimport pickle\b|autocast", text), file
        # One published layout is a torch file: its weights are read, and nothing else in it.
        loads = text.count("torch.load(")
        assert loads == (file.name == "_dictionary_learning.py"), file
        assert loads == text.count("weights_only=True"), file


def public_functions(tree):
    """Functions and methods of a module that others can call."""
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        if getattr(node, "name", "_").startswith("_"):
            continue
        yield from (f for f in inside if isinstance(f, ast.FunctionDef) and f.name[0] != "_")


def test_public_functions_that_take_tensors_say_their_shapes():
    for layer in ("sae", "lm", "train", "activations", "evaluate", "features"):
        for file in (PACKAGE / layer).glob("_*.py"):
            for function in public_functions(ast.parse(file.read_text("utf-8"))):
                for argument in function.args.args:
                    bare = isinstance(argument.annotation, ast.Name)
                    named = bare and argument.annotation.id
                    assert named != "Tensor", f"{file}:{function.name}({argument.arg})"


def test_tracked_files_weigh_less_than_the_limit():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.is_file()) < 40 * 2**20
    bundled = PACKAGE / "miniature"
    model = [*bundled.glob("model/*"), *bundled.glob("text/*"), *bundled.glob("*.md")]
    assert sum(f.stat().st_size for f in model) <= 14_000_000
