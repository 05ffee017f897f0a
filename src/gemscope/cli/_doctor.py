"""`gemscope doctor`."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from ._show import print_json

_NEEDED = (
    "torch", "transformers", "safetensors", "huggingface_hub", "numpy", "jaxtyping", "pydantic",
    "PyYAML", "typer", "rich", "matplotlib", "jinja2",
)  # fmt: skip
_OPTIONAL = {"datasets": "--dataset (pip install 'gemscope[data]')"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, devices and caches, and what is missing."""
    facts = _facts()
    if json:
        print_json(facts)
    else:
        for section, entries in facts.items():
            print(section)
            for name, value in (entries if isinstance(entries, dict) else {"": entries}).items():
                print(f"  {name:<18} {'missing' if value is None else value}".rstrip())
    if facts["problems"]:
        raise typer.Exit(1)


def _facts() -> dict[str, Any]:
    packages = {name: _version(name) for name in _NEEDED}
    problems = {name: "is not installed" for name, found in packages.items() if found is None}
    bundled = _bundled()
    if not bundled["model"]:
        problems["miniature"] = "its model is not in this installation"
    return {
        "gemscope": {"version": _version("gemscope"), "python": platform.python_version(),
                     "system": f"{platform.system()} {platform.machine()}"},
        "packages": packages,
        "optional": {n: _version(n) or f"missing: for {use}" for n, use in _OPTIONAL.items()},
        "devices": _devices() if packages["torch"] else {},
        "caches": _caches(),
        "miniature": bundled,
        "problems": problems,
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    return found


def _caches() -> dict[str, str]:
    from huggingface_hub import constants

    offline = "yes" if constants.HF_HUB_OFFLINE else "no"
    return {"hub": str(constants.HF_HUB_CACHE), "hub offline": offline}


def _bundled() -> dict[str, Any]:
    from gemscope import hub, miniature

    return {
        "model": (miniature.MODEL / "model.safetensors").is_file(),
        "dictionaries": len(hub.catalog(release="miniature")),
        "text": miniature.HELD_OUT.is_file(),
    }
