"""`gemscope intervene`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, number, percent, print_json, token_progress
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.lm import LanguageModel
    from gemscope.steering import Attribution, Intervention, Outcome


def intervene_command(
    clean: Annotated[str, typer.Argument(help="The prompt that is run and intervened in.")],
    metric: Annotated[str, typer.Option("--metric", help="logit:TOKEN, difference:TOKEN:TOKEN, probability:TOKEN, loss, kl, or feature:ADDRESS/INDEX.")],
    on: Annotated[list[str] | None, typer.Option("--on", metavar="TARGET", help="ADDRESS/INDEX, /all, /error or /bias of a dictionary, a site such as 3.mlp_out, or a head such as 3.attn_heads/2. May be repeated: all are changed together.")] = None,
    do: Annotated[str | None, typer.Option("--do", metavar="DEED", help="patch (from the corrupted prompt), ablate (to zero, or --mean), or set (features, to --value).")] = None,
    attribute: Annotated[list[str] | None, typer.Option("--attribute", metavar="ADDRESS", help="Instead: estimate the effect of every feature and error of this dictionary, and check the largest. May be repeated.")] = None,
    corrupted: Annotated[str | None, typer.Option(metavar="TEXT", help="Another prompt, token by token opposite the first.")] = None,
    value: Annotated[float | None, typer.Option(help="With set: the activation that features get.")] = None,
    mean: Annotated[str | None, typer.Option(metavar="TEXT", help="With ablate: to the mean over this text (a file, folder, 'miniature', 'python', 'code' ...), not to zero.")] = None,
    positions: Annotated[str | None, typer.Option(help="Tokens changed: all (the ordinary ones), last, 3, -2, 3:7, 2,5; BOS is 0.")] = None,
    each: Annotated[bool, typer.Option("--each", help="Also change every position by itself.")] = False,
    at: Annotated[int | None, typer.Option(help="Position of the metric; default: the last token.")] = None,
    top: Annotated[int | None, typer.Option(help="With --attribute: how many are checked and shown; default 20.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="Model to run; default: the dictionaries' own.")] = None,
    reads: Reads = None,
    writes: Writes = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Change what features, errors, heads or sites hold, and measure the effect."""
    from gemscope import hub, steering

    deeds = {"--do": do, "--value": value, "--mean": mean, "--positions": positions,
             "--each": each or None}  # fmt: skip
    _check(on, attribute, deeds, top)

    def load(address: str) -> Any:
        return hub.build(hub.obtain(hub.locate(address, given(reads, writes, model))))

    lm = _model([*(on or ()), *(f"{a}/all" for a in attribute or ()), *_of_metric(metric)],
                model, device, dtype)  # fmt: skip
    with token_progress({"positions": "passes", "exact effects": "features"}) as progress:
        if attribute:
            found = steering.attribute(
                lm, clean, attribute, metric=metric, corrupted=corrupted, top=top or 20, at=at,
                load=load, progress=progress,
            )  # fmt: skip
        else:
            assert on is not None
            assert do is not None
            made = steering.intervene(
                lm, clean, on, do=do, metric=metric, corrupted=corrupted, value=value, mean=mean,
                positions=positions, at=at, each=each, load=load, progress=progress,
            )  # fmt: skip
    if json:
        print_json(found.json() if attribute else made.json())
    elif attribute:
        _print_attribution(found)
    else:
        _print(made)


def _check(
    on: list[str] | None, attribute: list[str] | None, deeds: dict[str, Any], top: int | None
) -> None:
    if on and attribute:
        raise InputError("--on changes targets and --attribute estimates every feature; give one")
    if not on and not attribute:
        raise InputError("nothing to change: give --on TARGET and --do, or --attribute ADDRESS")
    if on and deeds["--do"] is None:
        raise InputError("what is to be done to the targets? give --do patch, ablate or set")
    if on and top is not None:
        raise InputError("--top is how many --attribute shows; it does not apply to --on")
    if attribute and (extra := [name for name, given in deeds.items() if given is not None]):
        raise InputError(f"{', '.join(extra)} is for --on; it does not apply to --attribute")


def _of_metric(metric: str) -> list[str]:
    kind, _, rest = metric.partition(":")
    return [rest] if kind == "feature" else []


def _model(
    targets: list[str], model: str | None, device: str | None, dtype: str | None
) -> "LanguageModel":
    from gemscope import hub, steering
    from gemscope.lm import load_model

    if model is None:
        addresses = [a for one in targets if (a := steering.address_of(one))]
        models = sorted({hub.locate(a).model for a in addresses})
        if len(models) != 1:
            said = f"these dictionaries belong to {' and '.join(models)}" if models else (
                "sites and heads do not say whose they are"
            )  # fmt: skip
            raise InputError(f"{said}: name a model with --model, such as miniature")
        model = models[0]
    return load_model(model, device=device, dtype=dtype)


def _table() -> Any:
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))


def _where(found: "Intervention | Attribution") -> str:
    if found.at is None:
        return str(found.metric)
    return f"{found.metric} at position {found.at} ({found.prompt.shown(found.at)})"


def _print(made: "Intervention") -> None:
    from rich.text import Text

    out, other = console(), made.corrupted_prompt
    how = {"patch": "patched from the corrupted prompt", "set": f"set to {made.value}",
           "ablate": "set to zero" if made.mean is None else f"set to the mean over {made.mean}"}  # fmt: skip
    names = ", ".join(one.name for one in made.targets)
    out.print(f"{_where(made)}: {names} {how[made.do]}\n", markup=False, soft_wrap=True)
    table = _table()
    for head in ("", "clean", *(["corrupted"] if other else []), "after", "effect",
                 *(["share"] if other else [])):  # fmt: skip
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    rows = [(f"{len(made.positions)} positions" if len(made.positions) > 1 else "1 position",
             made.outcome)]  # fmt: skip
    rows += [(_token(made, i), one) for i, one in enumerate(made.each or ())]
    for name, one in rows:
        cells = [number(made.clean), *([number(made.corrupted)] if other else []),
                 number(one.after), _signed(one.effect, made.clean),
                 *([_share(one, made.clean)] if other else [])]  # fmt: skip
        table.add_row(Text(name), *cells)
    out.print(table)
    if not made.each:
        tokens = "  ".join(_token(made, i) for i in range(len(made.positions)))
        out.print(f"\nPositions: {tokens}", markup=False, soft_wrap=True)
    for name, (clean, corrupted) in made.activations.items():
        if not any(clean) and not any(corrupted or ()):
            out.print(f"\n{name} is silent at these positions.", markup=False, soft_wrap=True)
    if other is not None:
        out.print("\nShare: of the way from the clean metric to the corrupted one.")


def _token(made: "Intervention", i: int) -> str:
    """A position with its token, and with the corrupted one where that is another."""
    place, other = made.positions[i], made.corrupted_prompt
    shown = f"{place} {made.prompt.shown(place)}"
    if made.opposite is None or other is None:
        return shown
    there = made.opposite[i]
    if (made.prompt.ids[place], place) == (other.ids[there], there):
        return shown
    return f"{shown} ← {other.shown(there)}" + ("" if there == place else f" ({there})")


def _print_attribution(found: "Attribution") -> None:
    from rich.text import Text

    out = console()
    toward = "toward zero"
    line = f"{_where(found)}: clean {number(found.clean)}"
    if found.corrupted is not None:
        line += f", corrupted {number(found.corrupted)} ({found.corrupted - found.clean:+.4g})"
        toward = "toward the corrupted run"
    out.print(line, markup=False, soft_wrap=True)
    for one in found.json()["dictionaries"]:
        errors = sum(one["sum_errors"].values())
        out.print(
            f"{one['address']}: {one['active_features']:,} features change {toward}; estimates sum "
            f"to {one['sum_features']:+.4g}, of errors to {errors:+.4g}",
            markup=False,
            soft_wrap=True,
        )
    a = found.agreement
    out.print(
        f"\nThe {a.nodes} largest estimates and exact effects: Pearson {number(a.pearson, 3)}, "
        f"Spearman {number(a.spearman, 3)}, same sign {percent(a.same_sign)}\n"
    )
    table = _table()
    # An address that is cut cannot be copied.
    table.add_column("feature", no_wrap=True, min_width=max(len(node.name) for node in found.top))
    table.add_column("estimate", justify="right", no_wrap=True, min_width=9)
    table.add_column("exact", justify="right", no_wrap=True, min_width=9)
    table.add_column("estimates by position", no_wrap=True, overflow="ellipsis")
    for node in found.top:
        pairs = sorted(zip(node.positions, node.parts, strict=True), key=lambda p: -abs(p[1]))
        said = ", ".join(f"{p} {found.prompt.shown(p)} {v:+.3g}" for p, v in pairs[:3])
        table.add_row(
            node.name, f"{node.attribution:+.4g}", f"{node.exact:+.4g}", Text(said)
        )  # fmt: skip
    out.print(table)


def _signed(effect: float, clean: float) -> str:
    return "0" if _is_nothing(effect, clean) else f"{effect:+.4g}"


def _share(one: "Outcome", clean: float) -> str:
    return "0" if _is_nothing(one.effect, clean) else percent(one.share)


def _is_nothing(effect: float, clean: float) -> bool:
    # What remains of an effect of nothing is how float32 rounds.
    return abs(effect) < 1e-6 * max(abs(clean), 1.0)
