"""Mistakes in training configs and their overrides: one sentence, before anything is trained."""

import math

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def train(refused, file, tmp_path):
    """Run a training config with changes, which must be refused."""

    def run(changes, *options, match):
        config = {
            "model": "miniature",
            "reads": "1.resid_post",
            "writes": "1.resid_post",
            "d_sae": 32,
            "out": str(tmp_path / "run"),
            "data": {"text": str(file("def f(x): return x\n" * 300)), "tokens": 512, "batch": 64,
                     "bucket": 256, "context": 64},
            "sparsity": {"l0": 4},
        }  # fmt: skip
        for path, value in changes.items():
            *sections, key = path.split(".")
            section = config
            for name in sections:
                section = section[name]
            section[key] = value
        refused("train", file(yaml.safe_dump(config), "c.yaml"), *options, match=match)
        assert not (tmp_path / "run" / "artefact").exists()

    return run


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a: [", "is not YAML"),
        ("day: 2024-13-45", "is not YAML"),
        (b"\xff", "is not YAML"),
        ("", "holds no keys"),
        ("- a", "holds no keys"),
        ("5: 5", "model is missing.*keys should be strings"),
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
        ({"widht": 5}, "no key 'widht'; nearest: "),
        ({"optimizer": {"rl": 1.0}}, "no key 'optimizer.rl'; nearest: lr"),
        ({"d_sae": "many"}, "d_sae is 'many': input should be a valid integer"),
        ({"d_sae": 32.5}, "d_sae is 32.5: "),
        ({"affine": "no"}, "affine is 'no': input should be a valid boolean"),
        ({"data": 5}, "data is 5: "),
        ({"data.batch": 0}, "data.batch is 0: input should be greater than 0"),
        ({"data.context": 1}, "data.context is 1: "),
        ({"seed": -1}, "seed is -1: "),
        ({"seed": 2**70}, f"seed is {2**70}: "),
        ({"sparsity": {}}, "sparsity.l0 is missing"),
        ({"sparsity.l0": 33}, "l0 33.0 is not below d_sae 32"),
        ({"sparsity.l0": math.nan}, "sparsity.l0 is nan: "),
        ({"sparsity.start_l0": 4}, "give either threshold or start_l0"),
        ({"affine": True}, "affine belongs to transcoders"),
        ({"data.tokens": 63}, "tokens 63 is less than one batch of 64"),
        ({"data.dataset": "a/b"}, "give either text or dataset"),
        ({"data.text": None}, "give either text or dataset"),
        ({"reads": "1.residpost"}, "no stream named 'residpost'; nearest: resid_post"),
        ({"reads": "one"}, "no such site: 'one'"),
        ({"reads": 1}, "reads is 1: "),
    ],
)
def test_a_mistake_in_a_config_is_named(train, changes, match):
    train(changes, match=match)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("data.tokens", "--set 'data.tokens' has no value"),
        ("data.tokens=", "data.tokens is None: "),
        ("data.tokens=ten", "data.tokens is 'ten': "),
        ("data.tokns=10", "no key 'data.tokns'; nearest: tokens"),
        ("model.name=x", "model is not a section"),
        ("model=[", r"'\[' is not YAML"),
        ("model=2024-13-45", "is not YAML"),
        ("=5", "no key ''"),
    ],
)
def test_a_mistake_in_an_override_is_named(train, override, match):
    train({}, "--set", override, match=match)


def test_there_must_be_something_to_resume(train, tmp_path):
    train({}, "--resume", match="nothing to resume: .* does not exist")
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_written_is_refused(train, file):
    out = file("", "plain") / "run"
    train({"out": str(out)}, match="cannot be written: .*; choose another out")


def test_a_finished_run_is_left_alone(refused, file, tmp_path):
    artefact = tmp_path / "run" / "artefact"
    artefact.mkdir(parents=True)
    (artefact / "mine").write_text("x")
    config = {
        "model": "miniature", "reads": "1.resid_post", "writes": "1.resid_post", "d_sae": 32,
        "out": str(tmp_path / "run"), "data": {"text": "miniature", "tokens": 5_000},
        "sparsity": {"l0": 4},
    }  # fmt: skip
    refused(
        "train", file(yaml.safe_dump(config), "c.yaml"), match="is finished; choose another out"
    )
    assert [f.name for f in (tmp_path / "run").rglob("*")] == ["artefact", "mine"]


def test_what_the_model_cannot_do_is_refused_before_training(train, miniature, file):
    longest, layers = miniature.max_context, miniature.n_layers
    train({"data.context": longest + 1}, match=f"context is {longest + 1}, .* at most {longest}")
    train({"model_dtype": "float16"}, match="overflow float16; use bfloat16 or float32")
    train({"model": "no/such"}, match="no/such is not in the cache")
    far = f"{layers}.resid_post"
    train({"reads": far, "writes": far}, match=f"{far} is not in .* 0 to {layers - 1}")
    train({"reads": "1.mlp_in_unscaled", "writes": "1.mlp_out"}, match="has no name in Gemma Scope")


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


def test_a_bucket_that_mixes_nothing_is_refused(train):
    train({"data.bucket": 127}, match="a bucket of 127 tokens mixes nothing .* take 128 or more")
