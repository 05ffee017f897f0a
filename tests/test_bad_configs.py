"""Mistakes in training configs and their overrides: one sentence, before anything is trained."""

import math

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("unchecked")

ARTEFACT = {"name": "a", "reads": "1.resid_post", "d_sae": 32, "l0": 4}


@pytest.fixture
def train(refused, file, tmp_path):
    """Run a training config with changes, which must be refused."""

    def run(changes, *options, match):
        config = {
            "model": "miniature",
            "out": str(tmp_path / "run"),
            "data": {"text": str(file("def f(x): return x\n" * 300)), "tokens": 512, "batch": 64,
                     "buffer": 256, "context": 64},
            "artefacts": [dict(ARTEFACT)],
        }  # fmt: skip
        for path, value in changes.items():
            *sections, key = path.split(".")
            section = config["artefacts"][0] if sections[:1] == ["a"] else config
            for name in sections[sections[:1] == ["a"] :]:
                section = section.setdefault(name, {})
            section[key] = value
        refused("train", file(yaml.safe_dump(config), "c.yaml"), *options, match=match)
        assert not (tmp_path / "run" / "a").exists()

    return run


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a: [", "is not YAML"),
        ("day: 2024-13-45", "is not YAML"),
        (b"\xff", "is not YAML"),
        ("", "holds no keys"),
        ("- a", "holds no keys"),
        ("5: 5", "artefacts is not a list of artefacts"),
        ("artefacts: [{reads: 1.resid_post}]\n5: 5", "model is missing.*keys should be strings"),
        ("artefacts: [{}]", "an artefact does not say what it reads; write reads: "),
        ("artefacts: []", "artefacts is not a list of artefacts"),
        ("artefacts: [{}]\nrecipe: 5", "recipe is 5, not keys of an artefact"),
    ],
)
def test_a_config_that_is_not_one_is_refused(refused, file, content, match):
    refused("train", file(content, "c.yaml"), match=match)


def test_a_config_that_is_not_there_is_refused(refused, tmp_path):
    refused("train", tmp_path / "none.yaml", match="no config at .*none.yaml")
    refused("train", tmp_path, match="no config at ")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.tokns": 5}, "no key 'data.tokns'; nearest: tokens"),
        ({"widht": 5}, "no key 'widht'; "),
        ({"a.widht": 5}, "a: no key 'widht'; "),
        ({"a.optimizer": {"rl": 1.0}}, "a: no key 'optimizer.rl'; nearest: lr"),
        ({"a.auxk": {"feature": 1}}, "a: auxk.features is missing; a: no key 'auxk.feature'"),
        ({"recipe": {"optimiser": {}}}, "a: no key 'optimiser'; nearest: optimizer"),
        ({"a.d_sae": "many"}, "a: d_sae is 'many': input should be a valid integer"),
        ({"a.d_sae": 32.5}, "a: d_sae is 32.5: "),
        ({"a.affine": "no"}, "a: affine is 'no': input should be a valid boolean"),
        ({"data": 5}, "data is 5: "),
        ({"data.batch": 0}, "data.batch is 0: input should be greater than 0"),
        ({"data.context": 1}, "data.context is 1: "),
        ({"data.buffer": 127}, "a buffer of 127 tokens mixes nothing .* take 128 or more"),
        ({"data.dtype": "int8"}, "data.dtype is 'int8': "),
        ({"data.seed": -1}, "data.seed is -1: "),
        ({"a.seed": 2**70}, f"a: seed is {2**70}: "),
        ({"a.l0": None}, "a: l0 is None: "),
        ({"a.l0": 32}, "a: l0 32 is not below d_sae 32"),
        ({"a.l0": math.nan}, "a: l0 is nan: "),
        ({"a.l0": 4.5, "a.activation": "topk"}, "a: l0 4.5 is the k of topk, a whole number"),
        ({"a.activation": "tanh"}, "a: activation is 'tanh': "),
        ({"a.activation": "relu"}, "relu has no threshold for the quadratic penalty .* take l1"),
        ({"a.sparsity.penalty": "l1"}, "a: the l1 penalty is for relu; take quadratic or linear"),
        ({"a.sparsity.start_l0": 4}, "a: sparsity: give either threshold or start_l0"),
        ({"a.sparsity.threshold": None}, "a: sparsity: give either threshold or start_l0"),
        ({"a.sparsity.bandwidth": 0}, "a: sparsity.bandwidth is 0: "),
        ({"a.sparsity.aim": 1}, "a: sparsity.aim is 1: "),
        ({"a.optimizer.lr": math.inf}, "a: optimizer.lr is inf: "),
        ({"a.optimizer.beta1": 1.0}, "a: optimizer.beta1 is 1.0: "),
        ({"a.optimizer.clip": 0}, "a: optimizer.clip is 0: "),
        ({"a.affine": True}, "affine belongs to transcoders"),
        ({"a.prefixes": [8, 8]}, r"a: prefixes \[8, 8\] do not ascend to d_sae 32"),
        ({"a.prefixes": [8, 32]}, r"a: prefixes \[8, 32\] do not ascend"),
        ({"a.prefixes": [0]}, r"a: prefixes \[0\] do not ascend"),
        ({"a.prefixes": [8], "a.prefix_weights": [1.0]},
         "prefix_weights has 1 values for 1 prefixes and the whole"),
        ({"a.prefixes": [8], "a.prefix_weights": [0.5, 0.6]}, "prefix_weights sum to 1.1, not 1"),
        ({"a.reads": "1.residpost"}, "no stream named 'residpost'; nearest: resid_post"),
        ({"a.reads": "one"}, "no such sites: 'one'; write LAYERS.STREAM"),
        ({"a.reads": 1}, "a: reads: 1 is no site; write LAYER.STREAM, such as"),
        ({"a.writes": "0.resid_post"}, r"reads 1\.resid_post comes after writes 0\.resid_post"),
        ({"a.reads": "2.mlp_in", "a.writes": "1-2.mlp_out"}, "is 1 sites, and writes .* is 2"),
        ({"a.reads": "1-2.mlp_in", "a.writes": "2-3.mlp_out"}, "they must be of the same layers"),
        ({"a.reads": "1-3.resid_post"}, "d_sae 32 is not a multiple of the 3 layers"),
        ({"a.reads": "1-2.resid_post", "a.activation": "topk"}, "a crosscoder is trained with"),
        ({"a.reads": "1-2.resid_post", "a.prefixes": [8]}, "without prefixes, auxk and end_to_end"),
        ({"a.reads": "1.mlp_in", "a.writes": "1.mlp_out", "a.end_to_end": {}},
         "end_to_end is for SAEs without prefixes"),
        ({"data.tokens": 63}, "tokens 63 is less than one batch of 64"),
        ({"data.dataset": "a/b"}, "give one of text, dataset and store"),
        ({"data.text": None}, "give one of text, dataset and store"),
        ({"data.text": None, "data.store": "x", "a.end_to_end": {}}, "end_to_end needs text"),
        ({"artefacts": [ARTEFACT, ARTEFACT]}, "two artefacts are called a; "),
        ({"artefacts": [ARTEFACT | {"end_to_end": {}}, ARTEFACT | {"name": "b"}]},
         "end_to_end is for all artefacts of a run or for none"),
        ({"artefacts": [ARTEFACT | {"end_to_end": {}},
                        ARTEFACT | {"name": "b", "reads": "2.resid_post", "end_to_end": {}}]},
         "end_to_end needs text, and artefacts of one site"),
        ({"log": ["tensorboard"]}, "log.0 is 'tensorboard': "),
        ({"evaluate": {"every": 0}}, "evaluate.every is 0: "),
        ({"checkpoint_every": 0}, "checkpoint_every is 0: "),
    ],
)  # fmt: skip
def test_a_mistake_in_a_config_is_named(train, changes, match):
    train(changes, match=match)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("data.tokens", "--set 'data.tokens' has no value"),
        ("data.tokens=", "data.tokens is None: "),
        ("data.tokens=ten", "data.tokens is 'ten': "),
        ("data.tokns=10", "no key 'data.tokns'; nearest: tokens"),
        ("artefacts.0.l0=99", "a: l0 99 is not below d_sae 32"),
        ("artefacts.1.l0=9", "artefacts.1 is not a section"),
        ("artefacts.x.l0=9", "artefacts.x is not a section"),
        ("recipe.l=9", "a: no key 'l'"),
        ("model.name=x", "model is not a section"),
        ("model=[", r"'\[' is not YAML"),
        ("model=2024-13-45", "is not YAML"),
        ("=5", "no key ''"),
    ],
)
def test_a_mistake_in_an_override_is_named(train, override, match):
    train({}, "--set", override, match=match)


def test_there_must_be_something_to_resume(train, tmp_path):
    train({}, "--resume", match="nothing to resume: no checkpoint in .*; leave --resume out")
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_written_is_refused(train, file):
    out = file("", "plain") / "run"
    train({"out": str(out)}, match="cannot be written: .*; choose another out")


def test_what_is_there_already_is_left_alone(refused, file, tmp_path):
    """Before training, not after it."""
    mine = tmp_path / "run" / "a"
    mine.mkdir(parents=True)
    (mine / "mine").write_text("x")
    config = {
        "model": "miniature", "out": str(tmp_path / "run"), "artefacts": [ARTEFACT],
        "data": {"text": "miniature", "tokens": 5_000},
    }  # fmt: skip
    given = file(yaml.safe_dump(config), "c.yaml")
    refused("train", given, match="is finished; choose another out, or remove")
    config["artefacts"] = [ARTEFACT, ARTEFACT | {"name": "b"}]
    given = file(yaml.safe_dump(config), "c.yaml")
    refused("train", given, match="holds a already; choose another out, or remove")
    assert [f.name for f in (tmp_path / "run").rglob("*")] == ["a", "mine"]


def test_what_the_model_cannot_do_is_refused_before_training(train, miniature):
    longest, layers = miniature.max_context, miniature.n_layers
    train({"data.context": longest + 1}, match=f"context is {longest + 1}, .* at most {longest}")
    train({"model_dtype": "float16"}, match="overflow float16; use bfloat16 or float32")
    train({"model": "no/such"}, match="no/such is not in the cache")
    far = f"{layers}.resid_post"
    train({"a.reads": far}, match=f"{far} is not in .* 0 to {layers - 1}")


def test_more_tokens_than_there_are_is_refused_before_training(train):
    train({"data.tokens": 64_000}, match="data.tokens is 64,000, and 1 epoch of the data are .*; "
          "set data.epochs to .* to repeat it, or give more data")  # fmt: skip


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is empty"),
        ("a b c", "less than one batch of 64"),
        ("<eos>" * 500, "less than one batch of 64"),
    ],
)
def test_text_too_short_to_train_on_is_refused(train, file, content, match):
    train({"data.text": str(file(content, "short.txt"))}, match=match)


RESIDUAL = "miniature/resid_post/layer_3_width_2k_l0_medium"
SKIPPING = "miniature/transcoder_all/layer_3_width_192_l0_small_affine"
OF_3 = {"a.reads": "3.resid_post", "a.d_sae": 2048, "a.start": RESIDUAL}
TRANSCODER = {"a.reads": "3.mlp_in", "a.writes": "3.mlp_out", "a.start": SKIPPING, "a.d_sae": 192}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (OF_3 | {"a.d_sae": 1024}, f"a: d_sae is 1024, and {RESIDUAL} has 2048 .* set d_sae: 2048"),
        (OF_3 | {"a.reads": "2.resid_post"}, r"3\.resid_post"),
        (OF_3 | {"a.reads": "2-3.resid_post"}, r"3\.resid_post|2048 features of 1 layers"),
        (TRANSCODER, f"a: affine is False, and {SKIPPING} has skip connection"),
        (TRANSCODER | {"a.writes": "3.resid_post"}, r"3\.mlp_out"),
        (OF_3 | {"a.start": "miniature/resid_post/layer_9"}, "layer_9"),
        (OF_3 | {"a.start": "./none"}, "none"),
        (OF_3 | {"a.start": "gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_25"}, "."),
    ],
)
def test_a_start_that_does_not_fit_is_refused(train, changes, match):
    train(changes, match=match)
