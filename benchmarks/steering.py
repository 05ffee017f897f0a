"""What steering costs in generation: three edits, beside the same generation without them.

`python benchmarks/run.py --keep steering` writes the records. Steered and unsteered runs take
turns, so that what else the machine does falls on both; the figure is the median of their ratios.
Beside them stands transformers' own `generate`, called without anything of ours.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

PROMPT = "import os\n\n\ndef main(arguments):\n    "
TOKENS, TURNS = 200, 15
FEATURES = tuple(
    f"miniature/resid_post_all/layer_{layer}_width_384_l0_small/7" for layer in (1, 3, 5)
)


def steering() -> Iterator[dict]:
    """200 tokens of the miniature with three features of three layers steered, by mode."""
    from gemscope.lm import load_model
    from gemscope.steering import Change, Mode, Steering, Strength, load_feature

    model = load_model("miniature")
    found = [load_feature(name) for name in FEATURES]
    # Where a text ends, a run would be shorter: nothing does.
    kept, model.hf.generation_config.eos_token_id = model.hf.generation_config.eos_token_id, None
    try:
        # An edit of little strength costs what any costs, and leaves the text alone.
        for mode, strength in ((Mode.ADD, 1e-3), (Mode.SET, 1e-3), (Mode.MULTIPLY, 1.001)):
            edits = [
                Steering([Change(what=f, mode=mode, strength=Strength(strength)) for f in found])
            ]
            yield _measured(model, mode, edits)
    finally:
        model.hf.generation_config.eos_token_id = kept


def _measured(model: Any, mode: str, edits: list) -> dict:
    ids = model.tokens(PROMPT).ids
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    cases: dict[str, Callable[[], Any]] = {
        "steered": lambda: model.generate(PROMPT, edits=edits, max_new_tokens=TOKENS)[0].ids,
        "plain": lambda: model.generate(PROMPT, max_new_tokens=TOKENS)[0].ids,
        "transformers": lambda: model.hf.generate(
            input_ids=ids, attention_mask=ids.new_ones(ids.shape), **options
        )[0, ids.shape[1] :],
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(TURNS + 1):
        # Each goes first in some of the turns.
        order = [*cases][turn % 3 :] + [*cases][: turn % 3]
        for name in order:
            began = time.perf_counter()
            made = cases[name]()
            seconds[name].append(time.perf_counter() - began)
            assert len(made) == TOKENS
    # The first turn warms up.
    steered, plain, bare = (seconds[name][1:] for name in cases)
    ratios = [s / p for s, p in zip(steered, plain, strict=True)]
    return {
        "command": f"generate {TOKENS} tokens with 3 edits in 3 layers, mode {mode}",
        "seconds": statistics.median(steered), "tokens": TOKENS,
        "unsteered_seconds": statistics.median(plain),
        "transformers_seconds": statistics.median(bare),
        "ratio_to_unsteered": statistics.median(ratios),
        "ratio_to_transformers": statistics.median(
            s / b for s, b in zip(steered, bare, strict=True)
        ),
        "lowest_ratio": min(ratios), "highest_ratio": max(ratios), "turns": TURNS,
    }  # fmt: skip
