"""Gemma Scope's layout: one `params.npz` in a folder, and nothing beside it.

`W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`, `b_enc`, `b_dec`, `threshold`, in float32, folded:
raw activations go in. The file says neither model nor site; the folder's place in its release does.
Some copies write the names in lower case, some add a `scaling_factor` of ones, and some arrays that
are no weights.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError, did_you_mean

from ._facts import DTYPES, Facts, Part, checked_shapes, checked_values, is_there, listed
from ._npz import Member, check_loadable, map_tensor, read_members
from ._writing import new_folder

if TYPE_CHECKING:
    from torch import Tensor

NAME = "gemma-scope"
PARAMETERS = "params.npz"
_NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
_PUBLISHED = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SCALE = "scaling_factor"


def matches(folder: Path) -> bool:
    """Whether `folder` is in this layout."""
    return is_there(folder / PARAMETERS)


def inspect(folder: Path) -> Facts:
    """The facts of the artefact in `folder`."""
    file, members = folder / PARAMETERS, _members(folder)
    d_in, d_sae, d_out = checked_shapes(file, {n: members[n].shape for n in _NAMES})
    return Facts(
        layout=NAME,
        kind=None if d_in == d_out else "transcoder",
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        affine=False,
        activation="jumprelu",
        dtype=DTYPES[members["w_enc"].dtype],
        files=(file,),
        shapes={members[n].name: members[n].shape for n in _NAMES},
    )


def read(folder: Path) -> tuple[Part, ...]:
    """The tensors, mapped from the file."""
    inspect(folder)
    file, members = folder / PARAMETERS, _members(folder)
    if _SCALE in members and (map_tensor(file, members[_SCALE]) != 1).any():
        raise InputError(f"{file}: scaling_factor is not all ones, and its meaning is not known")
    tensors = {name: map_tensor(file, members[name]) for name in _NAMES}
    part = Part(
        w_enc=tensors["w_enc"],
        b_enc=tensors["b_enc"],
        w_dec=tensors["w_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors["threshold"],
    )
    return (checked_values(file, part),)


def write(folder: Path, part: Part) -> None:
    """Write an artefact's folder; it appears whole or not at all."""
    import numpy as np

    if part.threshold is None or part.skip is not None:
        raise InputError(f"the {NAME} layout holds JumpReLU dictionaries without a skip connection")
    tensors: dict[str, Tensor] = {
        shown: getattr(part, name) for shown, name in zip(_PUBLISHED, _NAMES, strict=True)
    }
    arrays: dict[str, Any] = {n: t.detach().cpu().float().numpy() for n, t in tensors.items()}
    with new_folder(folder, read) as made:
        # Before numpy 2.1, allow_pickle=False would be one more array.
        np.savez(made / PARAMETERS, **arrays)


def _members(folder: Path) -> dict[str, Member]:
    file = folder / PARAMETERS
    members: dict[str, Member] = {}
    for name, member in read_members(file).items():
        if name.lower() in members:
            raise InputError(f"{file} has {name} twice, in two spellings: get the file again")
        members[name.lower()] = member
    if missing := [n for n in _NAMES if n not in members]:
        known = [m.name for m in members.values()]
        raise InputError(
            f"{file} lacks {', '.join(missing)}; it has {listed(known)}"
            + (f"; {did_you_mean(missing[0], known)}" if known else "")
        )
    for name in (*_NAMES, _SCALE):
        if name in members:
            check_loadable(file, members[name])
    return members
