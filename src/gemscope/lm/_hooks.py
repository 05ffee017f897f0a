"""Reading and editing tensors of a running `transformers` model, by plain hooks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemscope.errors import InputError
from gemscope.sites import Family, Side, Site, Stream

from ._edit import Edit
from ._frame import Frame


class Finished(Exception):  # noqa: N818
    """Every wanted tensor has been read: the rest of the forward pass is not needed."""


class Taps:
    """The hooks of one forward pass, and what they have read."""

    def __init__(self, stack: nn.Module, family: Family):
        self.stack, self.family = stack, family
        self.values: dict[Site, Tensor] = {}

    @contextmanager
    def attached(
        self,
        read: Sequence[Site],
        edits: Sequence[Edit],
        frame: Frame,
        *,
        stop: bool,
    ) -> Iterator[None]:
        """Hooks in place while the context lasts.

        A site is read before an edit of the same site is applied. `frame` knows which tokens each
        call of the model is about. With `stop`, `Finished` is raised as soon as all of `read` has
        been read.
        """
        handles = []
        later: list[tuple[Site, Any]] = []
        waiting = set(read)

        def keep(site: Site):
            def kept(value: Tensor) -> None:
                self.values[site] = value
                waiting.discard(site)
                if stop and not waiting:
                    raise Finished

            return kept

        # Hooks of one module run in this order: a site is read before it is edited.
        sources = {s for e in edits for s in _reads(e) if s != e.writes} - set(read)
        try:
            for site in sources:
                handles.append(self._hook(site, lambda v, s=site: self.values.__setitem__(s, v)))
            for site in dict.fromkeys(read):
                handles.append(self._hook(site, keep(site)))
            for edit in edits:
                act = self._change(edit, frame)
                if edit.writes.stream is Stream.RESID_MID:
                    act, past = _around(act)
                    later.append((Site(edit.writes.layer, Stream.MLP_OUT), past))
                handles.append(self._hook(edit.writes, act))
            for site, act in later:
                handles.append(self._hook(site, act))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _change(self, edit: Edit, frame: Frame) -> Any:
        reads = _reads(edit)

        def changed(value: Tensor) -> Tensor:
            sources = []
            for site in reads:
                if site != edit.writes and site not in self.values:
                    raise InputError(
                        f"{site} is computed after {edit.writes}: it cannot be written there"
                    )
                source = value if site == edit.writes else self.values[site]
                sources.append(frame.gather(source, placed=edit.placed))
            where = (frame.tokens,) if edit.placed else ()
            return frame.put(value, edit.function(*where, *sources), placed=edit.placed)

        return changed

    def _hook(self, site: Site, act: Any) -> torch.utils.hooks.RemovableHandle:
        """Call `act` with the tensor of `site`; what it returns, if anything, replaces it."""
        tap = self.family.tap(site)
        module = self.stack.get_submodule(tap.path(site.layer))
        if tap.gain_free:
            return module.register_forward_hook(self._gain_free(module, act))
        if tap.side is Side.INPUT:
            return module.register_forward_pre_hook(_on_input(act), with_kwargs=True)
        return module.register_forward_hook(_on_output(act))

    def _gain_free(self, module: nn.Module, act: Any):
        centred, eps = self.family.centred, epsilon(module)
        gain = self.family.gain_offset + module.get_parameter("weight").float()
        shift = module.get_parameter("bias").float() if centred else 0.0

        def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            x = args[0].float()
            if centred:
                unscaled = F.layer_norm(x, x.shape[-1:], eps=eps)
            else:
                unscaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            new = act(unscaled)
            return None if new is None else (new * gain + shift).to(output.dtype)

        return hook


def _reads(edit: Edit) -> tuple[Site, ...]:
    return (edit.reads,) if isinstance(edit.reads, Site) else edit.reads


def _around(change: Any) -> tuple[Any, Any]:
    """An edit of `resid_mid` in two: the MLP's norm reads the new stream, but the block adds the
    MLP's output to the old one, so what changed is added to that output.
    """
    moved: list[Tensor] = []

    def changed(value: Tensor) -> Tensor:
        new = change(value)
        moved.append(new - value)
        return new

    return changed, lambda out: out + moved.pop()


def _on_input(act: Any):
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            new = act(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = act(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(act: Any):
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        # Decoder layers return a tensor in transformers 5 and a tuple in 4.
        if isinstance(output, tuple):
            new = act(output[0])
            return None if new is None else (new, *output[1:])
        return act(output)

    return hook


def epsilon(norm: nn.Module) -> float:
    """What a norm adds to the mean square."""
    for name in ("eps", "variance_epsilon"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    raise AssertionError(f"{type(norm).__name__} names its epsilon otherwise")
