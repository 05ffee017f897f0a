"""Attention patterns of a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gemscope.errors import InputError

if TYPE_CHECKING:
    from ._model import LanguageModel

_SWITCHING = Lock()
"""Which implementation runs is written in a model's configuration."""


@contextmanager
def patterns(model: "LanguageModel", wanted: bool) -> Iterator[list[Tensor]]:
    """Where the patterns of the passes inside go, `[batch, heads, seq, seq]` a layer, if `wanted`.

    Faster implementations never hold a pattern: inside, the library's plain one runs.
    """
    if not wanted:
        yield []
        return
    if model.family.attn is None:
        raise InputError(
            f"models of the {model.family.name} family keep queries, keys and values in one "
            "matrix, whose attention patterns cannot be read; Gemma, Llama and Qwen models can"
        )
    found: list[Tensor] = []
    with _SWITCHING:
        before, handles = model.config._attn_implementation, []
        try:
            model.config._attn_implementation = "eager"
            for layer in range(model.n_layers):
                module = model.stack.get_submodule(model.family.attn.format(layer=layer))
                handles.append(module.register_forward_hook(_keep(found)))
            yield found
        finally:
            for handle in handles:
                handle.remove()
            model.config._attn_implementation = before


def _keep(found: list[Tensor]) -> Any:
    def hook(_module: Any, _args: tuple, output: tuple) -> None:
        found.append(output[1])

    return hook
