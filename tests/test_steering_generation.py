"""Steering while text is generated: the same as all of it at once, row by row, call by call."""

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import transformers as hf
from transcoded import SIZES

from gemscope import miniature as bundled
from gemscope.errors import InputError
from gemscope.lm import Edit, LanguageModel
from gemscope.sae import SAE, JumpReLU
from gemscope.sites import Site
from gemscope.steering import (
    Change,
    Direction,
    Mode,
    Positions,
    Schedule,
    Steering,
    Strength,
    feature,
    load_feature,
    steer,
)

LONG = "def area(width, height):\n    return width * height  # in metres\n"
PROMPTS = [LONG, "import os\n", "class Reader:\n    def __init__(self"]
NEW = 12
# Windows shorter than the text: what is far is in the cache of some layers and not of others.
WINDOWS = {"head_dim": 12, "sliding_window": 8}
MODELS = {
    "gemma-2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SIZES, **WINDOWS, attn_implementation="eager")
    ),
    "gemma-3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **SIZES, **WINDOWS,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
}  # fmt: skip


def wrapped(model):
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    tokenizer = hf.AutoTokenizer.from_pretrained(bundled.MODEL)
    return LanguageModel(model.eval().requires_grad_(False), tokenizer)


@pytest.fixture(scope="module")
def models(miniature):
    torch.manual_seed(0)
    made = {name: wrapped(build()) for name, build in MODELS.items()}
    return made | {"miniature": miniature}


@pytest.fixture(params=[*MODELS, "miniature"])
def model(models, request):
    return models[request.param]


def dictionary(model, layer):
    """A random dictionary that fires on about a third of the tokens."""
    site, d = Site.parse(f"{layer}.resid_post"), model.config.hidden_size
    x = model.run(PROMPTS, read=[site])[site].flatten(0, 1).float()
    generator = torch.Generator().manual_seed(layer)
    w_enc = torch.randn(d, 16, generator=generator) / d**0.5
    threshold = (x @ w_enc).quantile(0.66, dim=0).clamp_min(1e-3)
    w_dec = torch.randn(16, d, generator=generator)
    return SAE(
        w_enc=w_enc, b_enc=torch.zeros(16), w_dec=w_dec * x.norm(dim=1).mean() / d**0.5,
        b_dec=torch.zeros(d), activation=JumpReLU(threshold), reads=site, writes=site,
    )  # fmt: skip


def changes(model, positions="all", schedule=None, special=False):
    """Three edits in two layers, of kinds that read the stream and that do not."""
    where = Positions(special=special) if positions == "all" else Positions.parse(positions)
    more = {"positions": where, "schedule": schedule or Schedule()}
    first, second = (dictionary(model, layer) for layer in (0, 1))
    size = float(model.run(LONG, read=[first.reads])[first.reads].norm(dim=-1).mean())
    along = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    return [
        Change(what=feature(first, 3), mode=Mode.SET, strength=Strength(2.0), **more),
        Change(what=feature(second, 5), mode=Mode.MULTIPLY, strength=Strength(3.0), **more),
        Change(what=Direction(along, second.reads), mode=Mode.ADD,
               strength=Strength(0.05 * size), **more),
    ]  # fmt: skip


@contextmanager
def called(model):
    """The logits of every call of the model, `[batch, seq, vocab]`."""
    seen = []
    hook = model.hf.register_forward_hook(lambda m, a, out: seen.append(out.logits.clone()))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def endless(model):
    """No token ends a text."""
    config = model.hf.generation_config
    kept, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = kept


def generated(model, prompts, edits, **options):
    """What was generated, and for each row the logits that each token was chosen by."""
    with called(model) as calls, endless(model):
        made = model.generate(prompts, edits=edits, max_new_tokens=NEW, **options)
    return made, torch.stack([call[:, -1] for call in calls], dim=1)


def at_once(model, one, edits):
    """The same logits from one pass over prompt and continuation."""
    ids = torch.tensor([[*one.prompt_ids, *one.ids]])
    batch = model.tokens(LONG)
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))
    batch = type(batch)(ids, ~special, torch.tensor([0]), torch.tensor([0]))
    n = len(one.prompt_ids)
    return model.run(batch, edits=edits, logits=True, prompt=n).logits[0, n - 1 : -1]


def rounding(model):
    """How far apart the plain model's own two ways are; what an edit reads and writes is rounded
    as often again, and later layers see all of it.
    """
    (made,), steps = generated(model, LONG, [])
    return 16 * max((steps[0] - at_once(model, made, [])).abs().max().item(), 1e-6)


POSITIONS = ["all", "prompt", "generated", "last", "1:3", "last+generated"]


@pytest.mark.parametrize("positions", POSITIONS)
def test_step_by_step_is_all_at_once(model, positions):
    edits = [Steering(changes(model, positions))]
    made, steps = generated(model, PROMPTS, edits)
    _, plain = generated(model, PROMPTS, [])
    tolerance = rounding(model)
    for one, logits in zip(made, steps, strict=True):
        expected = at_once(model, one, edits)
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
        chosen = expected.gather(1, torch.tensor(one.ids)[:, None])
        assert (chosen >= expected.amax(1, keepdim=True) - 2 * tolerance).all()
    assert (steps - plain)[:, -1].abs().max() > 10 * tolerance, "the edits were felt"


@pytest.mark.parametrize("schedule", [Schedule(first=4), Schedule(decay=0.5), Schedule(2, 0.7)])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_schedules_step_by_step(models, schedule, positions):
    model = models["gemma-3"]
    edits = [Steering(changes(model, positions, schedule))]
    made, steps = generated(model, PROMPTS, edits)
    for one, logits in zip(made, steps, strict=True):
        torch.testing.assert_close(logits, at_once(model, one, edits), rtol=0, atol=rounding(model))


@pytest.mark.parametrize("special", [False, True])
def test_a_batch_is_row_by_row(model, special):
    edits = [Steering(changes(model, special=special))]
    made, steps = generated(model, PROMPTS, edits)
    lengths = {len(one.prompt_ids) for one in made}
    assert len(lengths) == len(PROMPTS), "rows are padded differently"
    for row, prompt in enumerate(PROMPTS):
        (alone,), expected = generated(model, prompt, edits)
        assert alone == made[row]
        torch.testing.assert_close(steps[row], expected[0], rtol=0, atol=rounding(model))


@pytest.mark.parametrize("mode", [m for m in Mode if m is not Mode.REPLACE])
def test_every_mode_step_by_step(models, mode):
    model = models["llama"]
    sae = dictionary(model, 1)
    strength = None if mode in (Mode.ABLATE, Mode.ABLATE_DIRECTION) else Strength(1.5)
    edits = [Steering([Change(what=feature(sae, 3), mode=mode, strength=strength)])]
    (made,), steps = generated(model, LONG, edits)
    torch.testing.assert_close(steps[0], at_once(model, made, edits), rtol=0, atol=rounding(model))


def by_transformers(model, prompt, **options):
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.random.fork_rng([]):
        torch.manual_seed(options.pop("seed", 0))
        out = model.hf.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
            pad_token_id=0, **options,
        )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def test_without_edits_it_is_what_transformers_generates(model):
    for prompt in PROMPTS:
        (made,) = model.generate(prompt, max_new_tokens=NEW)
        expected = by_transformers(model, prompt, do_sample=False)
        expected = expected[: expected.index(1)] if 1 in expected else expected
        assert list(made.ids) == expected
        assert made.text == model.tokenizer.decode(expected, skip_special_tokens=True)
        assert made.prompt == prompt
        assert list(made.prompt_ids) == model.tokenizer(prompt).input_ids


def test_sampled_it_is_what_transformers_samples(model):
    options = {"temperature": 0.9, "top_p": 0.8}
    (made,) = model.generate(LONG, max_new_tokens=NEW, seed=5, **options)
    expected = by_transformers(model, LONG, do_sample=True, top_k=0, seed=5, **options)
    assert list(made.ids) == (expected[: expected.index(1)] if 1 in expected else expected)


def test_neutral_edits_generate_the_same(model):
    with endless(model):
        plain = model.generate(PROMPTS, max_new_tokens=NEW)
        with called(model) as calls:
            none = [
                Change(what=c.what, mode=c.mode, strength=c.strength, amount=0.0)
                for c in changes(model, special=True)
            ]
            assert model.generate(PROMPTS, edits=[Steering(none)], max_new_tokens=NEW) == plain
        with called(model) as others:
            model.generate(PROMPTS, max_new_tokens=NEW)
    for a, b in zip(calls, others, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_the_same_seed_is_the_same_text(model):
    edits = [Steering(changes(model))]
    options = {"max_new_tokens": NEW, "temperature": 1.0, "samples": 3}
    state = torch.get_rng_state()
    one, two, other = (
        model.generate(PROMPTS[:2], edits=edits, seed=seed, **options) for seed in (4, 4, 5)
    )
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are untouched"
    assert one == two
    assert one != other
    assert [g.prompt for g in one] == [p for p in PROMPTS[:2] for _ in range(3)]
    assert len({g.ids for g in one[:3]}) > 1


def test_what_an_edit_is_told_of_each_token(model):
    told = []

    def note(tokens, x):
        told.append((*(v.tolist() for v in (tokens.rows, tokens.positions, tokens.ordinary,
                                            tokens.steps)), len(x)))  # fmt: skip
        return x

    where = Site.parse("1.resid_post")
    with endless(model):
        made = model.generate(
            PROMPTS, edits=[Edit(where, where, note, placed=True)], max_new_tokens=4
        )
    lengths = [len(one.prompt_ids) for one in made]
    rows, positions, ordinary, steps, n = told[0]
    expected = [(r, p) for r, length in enumerate(lengths) for p in range(length)]
    assert list(zip(rows, positions, strict=True)) == expected
    assert ordinary == [p > 0 for _, p in expected]
    assert steps == [p - lengths[r] for r, p in expected]
    assert n == len(expected)
    for step, (rows, positions, _, steps, n) in enumerate(told[1:]):
        assert rows == [0, 1, 2]
        assert positions == [length + step for length in lengths]
        assert steps == [step] * 3
        assert n == 3
    assert len(told) == 4


def test_every_token_is_heard(model):
    heard = []
    with endless(model):
        made = model.generate(PROMPTS, max_new_tokens=NEW, heard=heard.append)
    assert [tuple(row) for row in zip(*heard, strict=True)] == [one.ids for one in made]


def test_rows_that_have_ended_are_silent(models):
    model, heard = models["miniature"], []
    with endless(model):
        made = model.generate(PROMPTS, max_new_tokens=NEW)
    config = model.hf.generation_config
    # Another token that ends a text: one that the first row comes to.
    end = made[0].ids[3]
    kept, config.eos_token_id = config.eos_token_id, [1, end]
    try:
        found = model.generate(PROMPTS, max_new_tokens=NEW, heard=heard.append)
    finally:
        config.eos_token_id = kept
    for one, whole, row in zip(found, made, zip(*heard, strict=True), strict=True):
        stop = next((i for i, t in enumerate(whole.ids) if t in (1, end)), NEW)
        assert one.ids == whole.ids[:stop]
        assert [t for t in row if t is not None] == list(one.ids)
        assert set(row[stop:]) <= {None}


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture
def chatty(models):
    model = models["miniature"]
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return LanguageModel(model.hf, tokenizer, name=model.name)


def test_a_chat_is_the_templates_text_and_its_prefix_is_spared(chatty):
    where, told = Site.parse("1.resid_post"), []

    def note(tokens, x):
        told.append(tokens)
        return x

    with endless(chatty):
        (made,) = chatty.generate(
            "Hello", chat=True, edits=[Edit(where, where, note, placed=True)], max_new_tokens=3
        )
    text = "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    expected = chatty.tokenizer(text, add_special_tokens=False).input_ids
    assert list(made.prompt_ids) == expected
    special = set(chatty.tokenizer.all_special_ids)
    prefix = 1 + len(chatty.prefix.ids)
    ordinary = [i >= prefix and t not in special for i, t in enumerate(expected)]
    assert told[0].ordinary.tolist() == ordinary
    assert chatty.tokenizer.bos_token_id not in expected[1:]
    assert [len(t.rows) for t in told[1:]] == [1, 1]


def test_no_template_is_told(miniature):
    with pytest.raises(InputError, match="has no chat template; leave out --chat"):
        miniature.generate("Hello", chat=True)


@pytest.mark.parametrize("name", ["llama", "gemma-3"])
def test_under_a_static_cache(models, name):
    model = models[name]
    edits = [Steering(changes(model))]
    made, steps = generated(model, PROMPTS, edits)
    model.hf.generation_config.cache_implementation = "static"
    try:
        other, others = generated(model, PROMPTS, edits)
    finally:
        model.hf.generation_config.cache_implementation = None
    assert other == made
    torch.testing.assert_close(others, steps, rtol=0, atol=rounding(model))


def test_hooks_are_gone_after_generation_and_after_a_failure(miniature):
    before = miniature.generate(LONG, max_new_tokens=NEW)

    def fail(x):
        raise RuntimeError("on purpose")

    where = Site.parse("2.resid_post")
    with pytest.raises(RuntimeError, match="on purpose"):
        miniature.generate(LONG, edits=[Edit(where, where, fail)])
    assert miniature.generate(LONG, max_new_tokens=NEW) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in miniature.hf.modules())


def test_steer_gives_both_texts(miniature):
    what = load_feature("miniature/resid_post_all/layer_3_width_384_l0_small/7")
    edits = [Change(what=what, mode=Mode.ADD, strength=Strength(40.0))]
    heard = []
    found = steer(LONG, edits, model=miniature, max_new_tokens=NEW, samples=2, temperature=1.0,
                  seed=3, heard=lambda *args: heard.append(args))  # fmt: skip
    options = {"max_new_tokens": NEW, "temperature": 1.0, "samples": 2, "seed": 3}
    assert found.baseline == [g.text for g in miniature.generate(LONG, **options)]
    again = miniature.generate(LONG, edits=[Steering(edits)], **options)
    assert found.steered == [g.text for g in again]
    assert found.baseline != found.steered
    assert found.prompt == LONG
    assert heard


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_new_tokens": 0}, "0 new tokens are none"),
        ({"max_new_tokens": 10_000}, "more than the 512 that"),
        ({"temperature": -1.0}, r"a temperature of -1\.0: take 0"),
        ({"temperature": float("nan")}, "a temperature of nan"),
        ({"top_p": 0.0}, r"a top-p of 0\.0"),
        ({"samples": 0}, "0 samples are none"),
        ({"prompts": []}, "no prompt was given"),
        ({"prompts": [LONG, ""]}, "an empty text"),
    ],
)
def test_what_cannot_be_generated_is_told(miniature, options, why):
    with pytest.raises(InputError, match=why):
        miniature.generate(**{"prompts": LONG} | options)
