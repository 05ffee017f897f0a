"""Which format a path has, told from what is in it."""

from pathlib import Path

from gemscope.errors import InputError, did_you_mean

from ._files import is_empty, read_json
from ._neuronpedia import KINDS
from ._saedashboard import is_batch

FORMATS = ("catalog", "neuronpedia", "delphi", "saedashboard", "parquet")
_PARQUET = b"PAR1"


def format_of(path: Path, given: str | None = None) -> str:
    """The format of `path`: `given`, if that is one, or what its content is."""
    if given is not None and given not in FORMATS:
        raise InputError(
            f"no format {given!r}: {', '.join(FORMATS)}; {did_you_mean(given, FORMATS)}"
        )
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return given or (_folder(path) if path.is_dir() else _file(path))


def _folder(path: Path) -> str:
    names = {entry.name for entry in path.iterdir()}
    signs = {
        "parquet": bool(names & {"explanations.parquet", "notes.parquet", "features.parquet"}),
        "delphi": any(n.endswith(".safetensors") for n in names) or _modules(path),
        "saedashboard": any(n.startswith("batch-") and n.endswith(".json") for n in names),
        "neuronpedia": bool(names & {*KINDS, "v1"})
        or any(n.endswith((".jsonl", ".jsonl.gz")) for n in names)
        or any(path.glob("*/explanations/*.jsonl*")),
    }
    found = [name for name, there in signs.items() if there]
    if len(found) == 1:
        return found[0]
    what = f"could be {' or '.join(found)}" if found else "holds nothing of a known format"
    raise InputError(f"{path} {what}; say with --format what it is: {', '.join(FORMATS)}")


def _modules(path: Path) -> bool:
    return any(path.glob("*/*_*.safetensors")) and not any(path.glob("*/*.parquet"))


def _file(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if head == _PARQUET:
        return "parquet"
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return "neuronpedia"
    if path.suffix == ".safetensors":
        return "delphi"
    if is_empty(path):
        raise InputError(f"{path} is empty")
    return "saedashboard" if is_batch(read_json(path)) else "catalog"
