"""The report of a run: what was trained on what, how far it got, where the time went.

It is made from what lies in the run's folder and from nothing else, so it can be made again:
`config.yaml`, `metrics`, `evaluations.jsonl`, and `run.json`, which the run writes for it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from gemscope import __version__
from gemscope.errors import InputError
from gemscope.evaluate import finite, template, write_text
from gemscope.lm import LanguageModel

from ._config import Artefact, TrainConfig
from ._curves import Curve, curves
from ._floor import Floor, floor_seconds, measure_machine
from ._metrics import EVALUATIONS, metrics_file
from ._read import read_config
from ._trainer import Trainer

_RUN = "run.json"
_TEMPLATES = Path(__file__).parent / "templates"
_HELD_OUT = {
    "fvu": "fvu",
    "l0": "l0",
    "delta_loss": "delta_loss",
    "recovered": "loss_recovered_mean",
}
"""Figures of a look, as the report calls them and as the look does."""


class Journal:
    """`run.json`: what no other file of a run says. Written when it begins, and when it ends."""

    def __init__(self, folder: Path, config: TrainConfig, model: LanguageModel, trainer: Trainer):
        self.file, self.trainer = folder / _RUN, trainer
        widths = {site: model.width(site) for site in config.sites}
        machine = measure_machine(config, widths, model.device)
        self.floor: Floor = floor_seconds(config, widths, machine)
        before = _json(self.file) if trainer.step else {}
        self.began: str = before.get("began") or _now()
        self._looks: float = before.get("looks") or 0.0
        self._told = {
            "began": self.began,
            "ended": None,
            "model": model.name or config.model,
            "device": _device(model.device),
            "gemscope": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
            "widths": {str(site): width for site, width in widths.items()},
            "machine": asdict(machine),
            "floor": asdict(self.floor),
        }
        self.write()

    def timed(self, look: Callable[[int], None]) -> Callable[[int], None]:
        """`look`, whose time is no part of a step's."""

        def timed_look(step: int) -> None:
            began = datetime.now(UTC)
            look(step)
            self._looks += (datetime.now(UTC) - began).total_seconds()

        return timed_look

    def write(self, *, ended: bool = False) -> None:
        """Write it as the run stands."""
        t = self.trainer
        told = self._told | {
            "ended": _now() if ended else None,
            "step": t.step,
            "seconds": t.seconds,
            "looks": self._looks,
            "sections": dict(t.sections),
        }
        write_text(self.file, json.dumps(finite(told), indent=1) + "\n")


def write_training_report(folder: Path) -> Path:
    """Write `report.md`, `report.json`, `report.html` and `figures/curves.svg` of the run in
    `folder`, finished or not; the page's path.
    """
    config = read_config(folder / "config.yaml")
    lines: Lines = {}
    looks = _lines(folder / EVALUATIONS)
    for a in config.artefacts:
        lines |= _lines(metrics_file(folder, a.name))
    if not lines:
        raise InputError(f"{folder} has no metrics yet; a report needs a few steps of training")
    told = _record(config, lines, looks, _json(folder / _RUN))
    drawn = curves([_curve(a, lines, looks) for a in config.artefacts])
    try:
        (folder / "figures").mkdir(exist_ok=True)
        write_text(folder / "figures" / "curves.svg", drawn)
        plain = json.dumps(told, indent=1, ensure_ascii=False)
        write_text(folder / "report.json", plain + "\n")
        shown = yaml.safe_dump(told["config"], sort_keys=False, allow_unicode=True)
        for name in ("report.md", "report.html"):
            page = template(name.replace("report", "training"), _TEMPLATES)
            write_text(folder / name, page.render(run=told, curves=drawn, config=shown, **_WORDS))
    except OSError as error:
        raise InputError(f"the report cannot be written to {folder}: {error.strerror}") from None
    return folder / "report.html"


Lines = dict[str, list[dict]]
"""Of each artefact, what a JSONL file says of it."""


def _record(config: TrainConfig, lines: Lines, looks: Lines, run: dict) -> dict[str, Any]:
    """Everything the report says, ready for `json.dumps`."""
    data = config.data
    step = max(found[-1]["step"] for found in lines.values())
    step = max(step, run.get("step") or 0)
    seconds = run.get("seconds")
    time = _time(run)
    out: dict[str, Any] = {
        "title": f"Training: {run.get('model') or config.model}",
        "model": run.get("model") or config.model,
        "model_dtype": config.model_dtype,
        "sites": [str(site) for site in config.sites],
        "data": data.text or data.dataset or data.store,
        "tokens": step * data.batch,
        "step": step,
        "steps": config.steps,
        "batch": data.batch,
        "context": data.context,
        "seed": data.seed,
        "seconds": seconds,
        "looks_seconds": run.get("looks"),
        "tokens_per_second": data.batch / time["per_step"] if time else None,
    }
    out |= {key: run.get(key) for key in ("device", "gemscope", "torch", "transformers")}
    out |= {key: run.get(key) for key in ("began", "ended", "machine")}
    out["time"] = time
    out["artefacts"] = [_artefact(a, lines, looks) for a in config.artefacts]
    out["config"] = config.model_dump(mode="json")
    return finite(out)


def _time(run: dict) -> dict[str, Any] | None:
    """Where the time of a step went, and the least it could have been."""
    seconds, sections, step = run.get("seconds"), run.get("sections"), run.get("step")
    if not seconds or not sections or not step:
        return None
    training = max(seconds - run.get("looks", 0.0), 1e-9)
    rest = max(0.0, training - sum(sections.values()))
    floor = Floor(**run["floor"])
    return {
        "sections": [
            {"section": name, "seconds": spent, "share": spent / training, "per_step": spent / step}
            for name, spent in {**sections, "other": rest}.items()
        ],
        "per_step": training / step,
        "floor": {**asdict(floor), "seconds": floor.seconds, "bound": floor.bound},
        "ratio": training / step / floor.seconds,
    }


def _artefact(a: Artefact, lines: Lines, looks: Lines) -> dict[str, Any]:
    last = lines.get(a.name, [{}])[-1]
    look = looks.get(a.name, [None])[-1]
    return {
        "name": a.name,
        "kind": a.kind,
        "reads": str(a.reads),
        "writes": str(a.writes),
        "d_sae": a.d_sae,
        "activation": a.activation,
        "target_l0": a.l0,
        **{key: last.get(key) for key in ("step", "tokens", "l0", "fvu", "dead", "loss", "kl")},
        "held_out": None
        if look is None
        else {"step": look.get("step")} | {new: look.get(old) for new, old in _HELD_OUT.items()},
    }


def _curve(a: Artefact, lines: Lines, looks: Lines) -> Curve:
    losses = {x["tokens"]: x.get("delta_loss") for x in looks.get(a.name, [])}
    known = {tokens: loss for tokens, loss in losses.items() if loss is not None}
    return Curve(artefact=a, lines=lines.get(a.name, []), looks=known)


def _lines(file: Path) -> Lines:
    """The lines of a JSONL file; one that a process did not finish writing is left out.

    Where a run began again, what it wrote before of the same steps has been done anew.
    """
    out: Lines = {}
    for line in _read_lines(file) if file.is_file() else ():
        mine = out.setdefault(line["name"], [])
        while mine and mine[-1]["step"] >= line["step"]:
            mine.pop()
        mine.append(line)
    return out


def _read_lines(file: Path) -> Iterator[dict]:
    for line in file.read_text("utf-8").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and {"name", "step", "tokens"} <= found.keys():
            yield found


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{device.type}, {count} thread{'s' * (count > 1)}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """`3 h 07 min`, `4 min 9 s`, `12 s`, `350 ms`."""
    if seconds < 10:
        return short_time(seconds)
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def short_time(seconds: float) -> str:
    """A step's part in a unit that suits it."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def rate(value: float, unit: str) -> str:
    """`51 TFLOP/s`, `3.9 GB/s`."""
    for size, prefix in ((1e15, "P"), (1e12, "T")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}/s"
    return f"{value / 1e9:.3g} G{unit}/s"


def times(ratio: float) -> str:
    """`3.1 times`, `1,081 times`."""
    return f"{ratio:.1f} times" if ratio < 100 else f"{ratio:,.0f} times"


def percent(share: float | None) -> str:
    """`1.2%`, and what is not known as a dash."""
    return "–" if share is None else f"{share:.1%}"


def facts(run: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the figures hang on, as a table says it."""
    yield "model", f"{run['model']}, {run['model_dtype']}"
    yield "sites", ", ".join(run["sites"])
    yield "data", str(run["data"])
    yield "tokens", f"{run['tokens']:,}, contexts of {run['context']:,}"
    yield "steps", f"{run['step']:,} of {run['steps']:,}, {run['batch']:,} tokens each"
    yield "seed of the data", str(run["seed"])
    if run["seconds"] is not None:
        looks = run["looks_seconds"] or 0.0
        of_looks = f", of which {duration(looks)} looking at held-out text" if looks >= 1 else ""
        yield "time", duration(run["seconds"]) + of_looks
    if run["tokens_per_second"] is not None:
        yield "speed", f"{run['tokens_per_second']:,.0f} tokens/s"
    for name in ("device", "gemscope", "torch", "transformers", "began", "ended"):
        if run[name] is not None:
            yield name, str(run[name])


_WORDS = {
    "facts": facts,
    "duration": duration,
    "short_time": short_time,
    "percent": percent,
    "rate": rate,
    "times": times,
    "bounds": {
        "products": "the encoders' products",
        "parameters": "the traffic of parameters",
        "inputs": "the inputs",
    },
}
