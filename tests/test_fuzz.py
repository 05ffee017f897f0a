"""Damaged files are refused, or read by the letter; nothing else happens."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from handmade import CONFIG, VALUES, made, parsed, place, same, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemscope import formats
from gemscope.errors import InputError

pytestmark = pytest.mark.usefixtures("unchecked")


FUZZ = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BYTES = st.integers(0, 255)
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 2**16), BYTES),
    min_size=1,
    max_size=3,
)


def damaged(raw, damage):
    for kind, where, byte in damage:
        at = where % (len(raw) + 1)
        match kind:
            case "flip":
                raw = raw[:at] + bytes([byte]) + raw[at + 1 :]
            case "cut":
                raw = raw[:at] + raw[at + 1 + byte % 8 :]
            case "insert":
                raw = raw[:at] + bytes([byte]) + raw[at:]
    return raw


@FUZZ
@given(DAMAGE)
def test_a_damaged_parameter_file_is_refused_or_read_by_the_letter(damage):
    raw = damaged(whole(*made()), damage)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _, tensors = formats.read(place(Path(folder), raw or b"\0"))
        except InputError:
            return
        assert same({n: t.clone() for n, t in tensors.items()}, parsed(raw))
    assert all(t.isfinite().all() for t in tensors.values())
    assert {n: list(t.shape) for n, t in tensors.items()} == {n: s for n, (s, _) in VALUES.items()}


@FUZZ
@given(DAMAGE)
def test_a_damaged_config_is_refused_or_read_by_the_letter(damage):
    raw = damaged(json.dumps(CONFIG).encode(), damage)
    with tempfile.TemporaryDirectory() as folder:
        place(Path(folder))
        (Path(folder) / "config.json").write_bytes(raw)
        try:
            config = asdict(formats.read_config(Path(folder)))
        except InputError:
            return
    said = json.loads(raw)
    assert {n: type(v) for n, v in config.items()} == {n: type(v) for n, v in CONFIG.items()}
    assert all(config[n] == said[n] for n in config if n != "model_name")
    assert 0 < config["l0"] <= config["width"]
