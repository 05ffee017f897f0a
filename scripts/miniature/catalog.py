"""Index the whole scope of the miniature, find a rule for every feature, and tell how they hold up.

    python scripts/miniature/catalog.py --work build/miniature [--tokens 150000]

Leaves the catalog store in `WORK/catalog`, and writes `docs/rules-miniature.md` and
`docs/rules.png`, and the features' maxima beside the scope, to steer by. Stopped, the same command
goes on.
"""

import argparse
import platform
from pathlib import Path

from safetensors.numpy import save_file

from gemscope import explain, features, hub, miniature
from gemscope.features import Explanation, Store
from gemscope.lm import load_model

DOCS = Path(__file__).parents[2] / "docs"
HEAD = """# Rules for the whole miniature

Every feature of the {count} dictionaries that come with gemscope: {features:,} features, indexed
on {tokens:,} tokens ({sources}; the library is that of Python {python}). Rules were learned on 60%
of the tokens and scored on the rest, documents apart; [rules.md](rules.md) says how. "Another's" is
the share above 0.8 of another feature's rules on the same tokens. Made by
`python scripts/miniature/catalog.py --work build/miniature`, some minutes each for the index and
the rules on two cores.

**{over8:.0%} of all features have a rule with a balanced accuracy above 0.8 on documents it was not
learned on, {over9:.0%} above 0.9; of another feature's rules {null8:.1%} and {null9:.1%} are.**

![Share of rules that reach a balanced accuracy](rules.png)

"""
COLUMNS = ("dictionary", "features", "without rule", "above 0.8", "above 0.9", "another's",
           "median", "median precision")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=150_000)
    given = parser.parse_args()
    store = Store.create(given.work / "catalog")
    known = _index(store, given.tokens)
    _write_maxima(store, known)
    explained = _explain(store, [d["address"] for d in known])
    explain.draw_rule_scores(explained, DOCS / "rules.png")
    (DOCS / "rules-miniature.md").write_text(_told(known, explained), "utf-8")


def _index(store: Store, tokens: int) -> list[dict]:
    subjects = [
        features.Subject(
            address=e.address, sae=hub.build(e), digest=hub.digest(e), nominal_l0=e.l0
        )
        for e in hub.catalog(release="miniature")
    ]  # fmt: skip
    return features.index(
        load_model("miniature"), subjects, features.sources_of(tokens=tokens), store,
        features.Settings(tokens=tokens, keep_activations=True), model_name="miniature",
        progress=_progress,
    )  # fmt: skip


def _write_maxima(store: Store, known: list[dict]) -> None:
    found = {d["address"]: store.features(d["address"], ["max"])["max"].to_numpy() for d in known}
    sources = ", ".join(f"{s['name']} {s['tokens']:,}" for s in known[0]["sources"])
    save_file(found, miniature.MAXIMA, {"tokens": f"{known[0]['tokens']:,} ({sources})"})


def _progress(what: str, done: int, total: int) -> None:
    print(f"\r{what} {done:,}/{total:,}", end=" ", flush=True)


def _explain(store: Store, addresses: list[str]) -> dict[str, list[Explanation]]:
    ready, out = None, {}
    for address in addresses:
        found = [e for e in store.explanations(address) if e.method == "rule"]
        if not found:
            tokenizer = store.tokenizer(address)
            ready = ready or explain.RuleText.of(store.text(address), tokenizer)
            activations = store.activations(address)
            assert activations is not None
            found = list(
                explain.explain_by_rules(
                    ready.text, activations, address, tokenizer=tokenizer, prepared=ready
                )
            )
            store.add_explanations(found)
        out[address] = found
        print(f"\r{address}: {len(found)} rules", flush=True)
    return out


def _told(known: list[dict], explained: dict) -> str:
    every = [e for found in explained.values() for e in found]
    count = sum(d["d_sae"] for d in known)
    whole = explain.rule_summary(every, features=count)
    sources = ", ".join(f"{s['name']} {s['tokens']:,}" for s in known[0]["sources"])
    lines = [
        HEAD.format(
            count=len(known), features=count, tokens=known[0]["tokens"], sources=sources,
            python=platform.python_version(),
            over8=whole["of_all_above"]["0.8"], over9=whole["of_all_above"]["0.9"],
            null8=whole["above_null"]["0.8"], null9=whole["above_null"]["0.9"],
        )
    ]  # fmt: skip
    lines += [f"| {' | '.join(COLUMNS)} |\n", "|---|" + "--:|" * (len(COLUMNS) - 1) + "\n"]
    for d in sorted(known, key=lambda d: d["address"]):
        s = explain.rule_summary(explained[d["address"]], features=d["d_sae"])
        over, null = s["of_all_above"], s["above_null"]
        cells = (
            f"`{d['address'].removeprefix('miniature/')}`", f"{d['d_sae']:,}",
            f"{s['without_rule']:,}", f"{over['0.8']:.0%}", f"{over['0.9']:.0%}",
            f"{null['0.8']:.1%}", f"{s['median']:.2f}", f"{s['median_precision']:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


if __name__ == "__main__":
    main()
