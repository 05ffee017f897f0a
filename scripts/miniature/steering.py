"""Five features of the miniature worth steering: chosen by output score, shown with their doses.

    python scripts/miniature/steering.py --work build/miniature

Scores the residual-stream dictionaries of the catalog store in `WORK/catalog`, which
`catalog.py` makes, and writes `docs/steering-miniature.md` and `docs/steering/N.png`.
"""

import argparse
import textwrap
from pathlib import Path

from PIL import Image

from gemscope import steering
from gemscope.features import Store, described, marked
from gemscope.lm import LanguageModel, load_model

DOCS = Path(__file__).parents[2] / "docs"
SHOWN, VISIBLE, NEW = 5, 0.1, 30
STRENGTHS = "0.125xmax,0.25xmax,0.5xmax,0.75xmax,1xmax,1.5xmax,2xmax"
PROMPT = "def load(path):\n    "
HEAD = """# Five features worth steering

Nobody picked these. Of the {features:,} features of the miniature's {count} residual-stream
dictionaries, those with the highest output score come first ([dose.md](dose.md) says what that is:
how far amplifying a feature brings its own tokens out of a neutral prompt). They are taken from the
top, with three rules: the token it promotes most begins a word of four letters or more that no
earlier one promotes most; its dose has a knee, up to which the text still reads as the model's own;
and at the knee its tokens have a probability of 10% or more. Made by
`python scripts/miniature/steering.py --work build/miniature`.

Of all {features:,}, half score below {median:.2f}, one in ten above {tenth:.2f}.

| feature | output score | promotes | fires | knee | probability of its tokens, from → to |
|---|--:|---|---|--:|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    store = Store.open(given.work / "catalog")
    addresses = [d["address"] for d in store.dictionaries() if "/resid_post" in d["address"]]
    steering.score_store(
        store, addresses, progress=lambda *told: print("\r", *told, end=" ", flush=True)
    )
    ranked = []
    for address in addresses:
        rows = store.features(address, ["output_score", "promoted"]).to_pylist()
        ranked += [
            (row["output_score"], address, row["feature"], row["promoted"])
            for row in rows
            if row["output_score"] is not None
        ]
    ranked.sort(key=lambda one: (-one[0], one[1:3]))
    chosen = _chosen(ranked, store)
    scores = [score for score, *_ in ranked]
    text = HEAD.format(
        features=len(ranked), count=len(addresses), median=scores[len(scores) // 2],
        tenth=scores[len(scores) // 10],
    )  # fmt: skip
    (DOCS / "steering-miniature.md").write_text(text + _told(chosen, store), "utf-8")


def _chosen(ranked: list[tuple], store: Store) -> list[tuple[float, steering.Dose]]:
    model, words, found = load_model("miniature"), set(), []
    strengths = [steering.Strength.parse(part) for part in STRENGTHS.split(",")]
    for score, address, index, promoted in ranked:
        token = promoted[0]["token"]
        word = token.removeprefix(" ")
        if word == token or not (word.isalpha() and len(word) >= 4) or word.lower() in words:
            continue
        feature = steering.load_feature(f"{address}/{index}", store=store)
        dose = steering.dose(model, feature, steering.neutral_prompts(model), strengths)
        print(f"\n{feature.name} {word!r} {score:.3f} {dose.knee}", flush=True)
        if dose.knee is None or _at_knee(dose).measures["promoted"].value < VISIBLE:
            continue
        words.add(word.lower())
        found.append((score, dose, _continued(model, feature, dose)))
        if len(found) == SHOWN:
            break
    return found


def _at_knee(dose: steering.Dose) -> steering.Point:
    return next(p for p in dose.points if p.strength == dose.knee)


def _continued(model: LanguageModel, feature: steering.Feature, dose: steering.Dose) -> list[str]:
    change = steering.Change(what=feature, mode=steering.Mode.ADD, strength=dose.knee)
    done = steering.steer(PROMPT, change, model=model, max_new_tokens=NEW)
    return [done.baseline[0], done.steered[0]]


def _told(chosen: list[tuple], store: Store) -> str:
    names = [tuple(dose.feature.rsplit("/", 1)) for _, dose, _ in chosen]
    said = described(store, [(address, int(index)) for address, index in names])
    rows, parts = [], []
    (DOCS / "steering").mkdir(exist_ok=True)
    for number, ((address, index), (score, dose, texts)) in enumerate(
        zip(names, chosen, strict=True), 1
    ):
        fires, value = said.get((address, int(index)), ("not explained", None))
        before, after = dose.baseline.measures["promoted"], _at_knee(dose).measures["promoted"]
        rule = textwrap.shorten(fires, 90, placeholder=" …")
        tokens = " ".join(f"`{marked(t)}`" for t in dose.promoted[:4])
        short = dose.feature.removeprefix("miniature/")
        rows.append(
            f"| `{short}` | {score:.2f} | {tokens} | {rule} ({value or 0:.2f}) | {dose.knee} "
            f"| {before.value:.1%} → {after.value:.1%} [{after.low:.1%}, {after.high:.1%}] |\n"
        )
        file = DOCS / "steering" / f"{number}.png"
        steering.draw_dose(dose, file)
        Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)
        parts.append(
            f"\n## {tokens}\n\n```\n$ gemscope steer ${PROMPT!r} --feature {dose.feature} "
            f"--strength {dose.knee} --max-new-tokens {NEW}\n"
            f"--- without edits\n{texts[0]}\n--- steered\n{texts[1]}\n```\n"
            f"\n![Effect and cost of {short} by strength](steering/{number}.png)\n"
        )
    return (
        "".join(rows)
        + "\nIn brackets after what a feature fires on: its rule's balanced accuracy.\n"
        + "".join(parts)
    )


if __name__ == "__main__":
    main()
