"""Shapes are checked in every test; nothing reaches a network."""

import os
import re

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; products of theirs that wait for each other's threads crawl.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

_hook = install_import_hook("gemscope", "beartype.beartype")

import pytest
import torch
from filelock import FileLock

WIDEST = "miniature/resid_post/layer_3_width_2k_l0_medium"


@pytest.fixture(scope="session")
def miniature():
    """The bundled model, in float32."""
    from gemscope.lm import load_model

    return load_model("miniature", device="cpu")


@pytest.fixture(scope="session")
def exact():
    """The bundled model in float64."""
    from gemscope.lm import load_model

    return load_model("miniature", device="cpu", dtype="float64")


@pytest.fixture(scope="session")
def entries():
    """The catalog's artefacts."""
    from gemscope.hub import catalog

    return catalog(release="miniature")


@pytest.fixture(scope="session")
def residual(entry):
    """The widest residual-stream dictionary."""
    from gemscope.hub import build

    return build(entry)


@pytest.fixture(scope="session")
def kinds(entries):
    """An artefact of each kind and site, with and without skip connection: the widest."""
    from gemscope.sites import each

    wide = sorted(entries, key=lambda e: (e.d_sae, e.address))
    return list({(e.kind, each(e.reads)[0].stream, e.affine): e for e in wide}.values())


@pytest.fixture
def generator():
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def command(capsys):
    """Run a command in this process: `(exit code, stdout, stderr)`."""
    from gemscope.cli import main

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def unchecked():
    """Shape checks off: what a user without them is told."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def entry(entries):
    """The widest SAE of the residual stream."""
    (found,) = (e for e in entries if e.address == WIDEST)
    return found


@pytest.fixture
def refused(command):
    """Run a command that must be refused, for a reason that matches."""

    def run(*arguments, match):
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), err
        # A dot matches no line break: this is the whole of stderr, and one line.
        assert re.fullmatch(rf"gemscope: .*(?:{match}).*\n", err), err

    return run


@pytest.fixture
def file(tmp_path):
    """A file with the given content."""

    def make(content, name="file.txt"):
        made = tmp_path / name
        made.write_bytes(content if isinstance(content, bytes) else content.encode())
        return made

    return make


INDEXED = tuple(f"miniature/resid_post_all/layer_{n}_width_384_l0_small" for n in (2, 3))


@pytest.fixture(scope="session")
def indexed():
    """Addresses of the dictionaries in `small_store`: the same site of two layers."""
    return INDEXED


@pytest.fixture(scope="session")
def small_store(miniature, tmp_path_factory):
    """A catalog store of two dictionaries on 20,000 tokens, activations kept; to be read only."""
    from gemscope import features, hub

    subjects = []
    for address in INDEXED:
        entry = hub.obtain(hub.locate(address))
        subjects.append(
            features.Subject(
                address=address,
                sae=hub.build(entry),
                digest=hub.digest(entry),
                nominal_l0=entry.l0,
            )
        )
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "small-store"
    with FileLock(base / "small-store.lock"):  # the first worker makes it, for all
        if not (folder / "made").exists():
            _make_store(folder, miniature, subjects)
            (folder / "made").touch()
    return folder


def _make_store(folder, miniature, subjects):
    from gemscope import features

    features.index(
        miniature,
        subjects,
        features.sources_of(tokens=20_000),
        features.Store.create(folder),
        features.Settings(tokens=20_000, keep_activations=True),
        model_name="miniature",
    )


@pytest.fixture
def own_store(small_store, tmp_path):
    """A copy of `small_store` that a test may write to."""
    import shutil

    return shutil.copytree(small_store, tmp_path / "store")
