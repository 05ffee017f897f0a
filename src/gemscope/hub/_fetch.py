"""An artefact's files: in the hub's local cache, or brought there, or into a folder."""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from gemscope import formats, miniature
from gemscope.errors import InputError

from ._entry import Remote
from ._places import Cache, Folder, snapshots
from ._transfer import (
    PAGE,
    Held,
    checked_token,
    conversation,
    head,
    listing,
    offline,
    told,
    transfer,
)

EXAMPLES = "examples.safetensors"
# Beside weights, whose names `formats` knows, the rest of a folder is not for loading.
_CONFIGS = ("config.json", "cfg.json", "hyperparams.json", "config")
_MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_INDEX = "model.safetensors.index.json"
_MODEL_OTHERS = (
    "config.json", "generation_config.json", _INDEX, "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip


def cached(remote: Remote) -> Path | None:
    """The folder of the hub's cache that has all of `remote.files`, looked up without a request."""
    _check(remote)
    for snapshot in snapshots(remote.repo):
        folder = snapshot / remote.folder
        if all((folder / name).is_file() for name in remote.files):
            return folder
    return None


def fetch(
    remote: Remote,
    *,
    token: str | None = None,
    to: Path | None = None,
    examples: bool = False,
    quiet: bool = False,
) -> Path:
    """The folder with an artefact's files, downloaded if they are not in the cache.

    An interrupted download goes on when it is asked for again. `to` is a folder to have the files
    in, at `<repository name>/<folder>`, instead of the cache. `examples` adds the file of
    activating texts, which nothing else reads and is large. Unless `quiet`, a terminal is told
    how much is to come, and shown bars.
    """
    if examples:
        remote = replace(remote, files=(EXAMPLES, *remote.files))
    folder = cached(remote)
    if folder is not None:
        return folder if to is None else _copied(remote, folder, Folder(to, remote.repo))
    place = Cache(remote.repo) if to is None else Folder(to, remote.repo)
    if offline():
        address = f"{remote.repo}/{remote.folder}".rstrip("/")
        raise _not_here(address, f"gemscope download {address}")
    token = checked_token(token)
    with conversation(quiet=quiet):
        plan = _plan(remote, token)
        with told(remote.repo, remote.folder, place.root):
            missing = [held for held in plan if not place.has(held)]
        _check_room(place, missing)
        if missing and not quiet:
            _announce(remote.repo, missing)
        for held in plan:
            if held in missing:
                _bring(remote.repo, held, place, token)
            place.keep(held, token)
        place.finish(plan[-1].commit)
    return place.of(plan[-1].commit) / remote.folder


def find(repo_path: str, *, token: str | None = None) -> Remote:
    """The artefact at `owner/repository/folder` of the hub, by the names of the files there."""
    repo, folder = _parts(repo_path)
    at = f"{repo}/{folder}".rstrip("/")
    here = next((r for s in snapshots(repo) if (r := _cached_at(s, repo, folder))), None)
    # Of several files some may not have come yet; the hub knows how many there are.
    if here and (offline() or not any("layer" in name for name in here.files)):
        return here
    if offline():
        raise _not_here(at, f"gemscope download {at}")
    try:
        with conversation(quiet=True):
            token = checked_token(token)
            names, folders = listing(repo, folder, token=token)
            for inner in _inner_folders() & {*folders}:
                inside, _ = listing(repo, f"{folder}/{inner}".lstrip("/"), token=token)
                names += [f"{inner}/{name}" for name in inside]
    except InputError:
        if here:
            return here
        raise
    if files := _loadable(names):
        return Remote(repo, folder, files)
    if not names and not folders:
        raise InputError(f"the hub has no folder {folder} in {repo}: look at {PAGE}/{repo}")
    there = [name for name in folders if _is_plain(name)][:3]
    below = (
        f"add one of its folders to the address, such as {', '.join(there)}"
        if there
        else f"look at {PAGE}/{repo}/tree/main/{folder}".rstrip("/")
    )
    raise InputError(f"{at} holds no dictionary that can be loaded: {below}")


def has_model(name: str) -> bool:
    """Whether a model can be loaded without a network: bundled, a folder, or in the cache."""
    if name in (miniature.MODEL_NAME, "miniature") or Path(name).expanduser().is_dir():
        return True
    plain = re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) and all(map(_is_plain, name.split("/")))
    return bool(plain) and any(_is_model(s) for s in snapshots(name))


def fetch_model(
    name: str,
    *,
    token: str | None = None,
    to: Path | None = None,
    quiet: bool = False,
) -> Path:
    """The folder with a model's weights in safetensors, its configuration and its tokenizer."""
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) or not all(map(_is_plain, name.split("/"))):
        raise InputError(f"{name!r} is not the name of a model on the hub, such as owner/name")
    whole = next((s for s in snapshots(name) if _is_model(s)), None)
    if whole is not None:
        files = _model_files(_names(whole))
        return fetch(Remote(name, "", files), token=token, to=to)
    if offline():
        raise _not_here(name, f"hf download {name}")
    with conversation(quiet=True):
        names, _ = listing(name, "", token=checked_token(token))
    files = _model_files(names)
    if not any(map(_MODEL_WEIGHTS.fullmatch, files)):
        raise InputError(
            f"{name} has no weights in safetensors at {PAGE}/{name}: give another model"
        )
    remote = Remote(name, "", files)
    return fetch(remote, token=token, to=to, quiet=quiet)


def _bring(repo: str, held: Held, place: Cache | Folder, token: str | None) -> None:
    from huggingface_hub.utils import WeakFileLock

    final, partial, lock = place.final(held), place.partial(held), place.lock(held)
    with told(repo, held.path, final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        # Two processes that wrote one part would spoil it for each other.
        with WeakFileLock(lock):
            if not place.has(held):
                transfer(repo, held, partial, token=token)
                os.replace(partial, final)


def _plan(remote: Remote, token: str | None) -> list[Held]:
    """The files to have, all of one commit, those that loading needs last.

    Whoever finds these in the cache may then take the folder for whole.
    """
    plan, revision = [], "main"
    for name in (*remote.optional, *remote.files):
        path = f"{remote.folder}/{name}".lstrip("/")
        held = head(remote.repo, path, revision=revision, token=token)
        if held is not None:
            plan.append(held)
            revision = held.commit
        elif name in remote.files:
            raise InputError(
                f"the hub has no {path} in {remote.repo}: look for the folder at "
                f"{PAGE}/{remote.repo}/tree/main"
            )
    return plan


def _copied(remote: Remote, folder: Path, place: Folder) -> Path:
    """The files of a cached folder, copied."""
    for name in (*remote.optional, *remote.files):
        source, path = folder / name, f"{remote.folder}/{name}".lstrip("/")
        if not source.is_file():
            continue
        final, made = place.at(path), place.at(path, beside=f"{os.getpid()}.incomplete")
        with told(remote.repo, path, final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source, made)
                os.replace(made, final)
            finally:
                made.unlink(missing_ok=True)
    return place.of("") / remote.folder


def _check_room(place: Cache | Folder, missing: Sequence[Held]) -> None:
    there = place.root.absolute()
    there = next((p for p in (there, *there.parents) if p.is_dir()), there)
    need = 0
    for held in missing:
        partial = place.partial(held)
        need += (held.size or 0) - (partial.stat().st_size if partial.is_file() else 0)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        return
    if need > free:
        raise InputError(
            f"the disk of {there} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are to "
            "come: make room, or choose another place with --to or HF_HOME"
        )


def _announce(repo: str, missing: Sequence[Held]) -> None:
    """Tell who is at a terminal how much is to come: some artefacts are of 19 GB."""
    if sys.stderr is not None and sys.stderr.isatty():
        size = sum(held.size or 0 for held in missing)
        print(f"{repo}: {len(missing)} file(s), {size / 1e6:,.1f} MB to come", file=sys.stderr)


def _not_here(what: str, command: str) -> InputError:
    return InputError(
        f"{what} is not in the cache, and HF_HUB_OFFLINE is set: download it where there is a "
        f"network: {command}"
    )


def _cached_at(snapshot: Path, repo: str, folder: str) -> Remote | None:
    names = _names(snapshot / folder)
    for inner in _inner_folders():
        names += [f"{inner}/{name}" for name in _names(snapshot / folder / inner)]
    files = _loadable(names)
    return Remote(repo, folder, files) if files else None


def _patterns() -> set[str]:
    """Names of the files of all layouts that can be read."""
    return {p for layout in formats.LAYOUTS for p in re.findall(r"[\w*/-]+\.\w+", layout.files)}


def _inner_folders() -> set[str]:
    """Folders in an artefact's folder that a layout keeps files in."""
    return {pattern.rpartition("/")[0] for pattern in _patterns() if "/" in pattern}


def _loadable(names: Sequence[str]) -> tuple[str, ...]:
    """The files of a folder that loading needs, configurations first."""
    known = [name for name in names if any(fnmatchcase(name, p) for p in _patterns())]
    weights = sorted(name for name in known if name not in _CONFIGS)
    return (*(c for c in _CONFIGS if c in names), *weights) if weights else ()


def _model_files(names: Sequence[str]) -> tuple[str, ...]:
    weights = sorted(name for name in names if _MODEL_WEIGHTS.fullmatch(name))
    return (*(n for n in _MODEL_OTHERS if n in names), *weights)


def _is_model(snapshot: Path) -> bool:
    """Whether a cached model is whole: its weights come last, and an index names them all."""
    try:
        index = json.loads((snapshot / _INDEX).read_text("utf-8"))
        wanted = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        wanted = {"model.safetensors"}
    return all((snapshot / name).is_file() for name in {"config.json", *wanted})


def _names(folder: Path) -> list[str]:
    try:
        return sorted(f.name for f in folder.iterdir() if f.is_file())
    except OSError:
        return []


def _parts(repo_path: str) -> tuple[str, str]:
    parts = repo_path.rstrip("/").split("/")
    if len(parts) < 2 or not all(map(_is_plain, parts)):
        raise InputError(f"{repo_path!r} is not an address of the hub: owner/repository/folder")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _check(remote: Remote) -> None:
    """Refuse names that would lead out of the folder they belong in."""
    for path in (remote.repo, remote.folder, *remote.files, *remote.optional):
        if path and not all(map(_is_plain, path.split("/"))):
            raise InputError(f"{path!r} of {remote.repo!r} is not a name of a file on the hub")


def _is_plain(name: str) -> bool:
    return name.strip(".") != "" and re.fullmatch(r"[\w.+=@ ()-]+", name) is not None
