"""From the files of a folder to an entry, with names and flags for what files do not say."""

from dataclasses import dataclass
from pathlib import Path

from gemscope import formats
from gemscope.errors import InputError
from gemscope.sites import Site, Sites

from ._entry import Entry, Remote


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a user says of an artefact whose files do not say it."""

    reads: Site | Sites | None = None
    writes: Site | Sites | None = None
    model: str | None = None


def describe(
    folder: Path,
    *,
    address: str,
    given: Given = Given(),
    known: Entry | None = None,
    licence: str | None = None,
    remote: Remote | None = None,
) -> Entry:
    """The entry of the artefact in `folder`.

    Its files are believed first, then `given`, then `known`, what the catalog has for its name.
    """
    facts = formats.inspect(folder)
    reads = _site(address, "reads", facts.reads, given.reads, known)
    if facts.kind == "sae" and facts.writes is None and given.writes is None:
        writes = reads
    else:
        writes = _site(address, "writes", facts.writes, given.writes, known, default=reads)
    model = facts.model or given.model or (known.model if known else None)
    if model is None:
        raise InputError(
            f"the files of {address} do not say which model they belong to: give it with --model, "
            "such as --model google/gemma-2-2b"
        )
    many = isinstance(reads, Sites)
    if many:
        kind = "crosscoder" if reads == writes else "clt"
    else:
        kind = "sae" if reads == writes else "transcoder"
    if facts.kind is not None and facts.kind != kind:
        raise InputError(
            f"{address} is a {facts.kind} by its files, and one that reads {reads} and writes "
            f"{writes} would be a {kind}: give the right sites with --reads and --writes"
        )
    return Entry(
        address=address,
        kind=kind,
        reads=reads,
        writes=writes,
        d_in=facts.d_in,
        d_out=facts.d_out,
        d_sae=facts.d_sae,
        l0=facts.l0 if facts.l0 is not None else (known.l0 if known else None),
        affine=facts.affine,
        dtype=facts.dtype,
        model=model,
        licence=licence or (known.licence if known else None),
        layout=facts.layout,
        canonical=known.canonical if known else False,
        neuronpedia=known.neuronpedia if known else None,
        path=folder.resolve(),
        remote=remote,
    )


def _site(
    address: str,
    what: str,
    said: Site | Sites | None,
    given: Site | Sites | None,
    known: Entry | None,
    *,
    default: Site | Sites | None = None,
) -> Site | Sites:
    if said is not None and given is not None and said != given:
        raise InputError(
            f"--{what} {given} contradicts the files of {address}, which say {said}: leave it out"
        )
    found = said or given or (getattr(known, what) if known else None) or default
    if found is None:
        raise InputError(
            f"the files of {address} do not say which site they belong to: give it with "
            f"--{what}, such as --{what} 20.resid_post"
        )
    return found
