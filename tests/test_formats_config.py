"""The config of Gemma Scope 2's files: believed by the letter, or refused with a reason."""

import math
from dataclasses import asdict

import pytest
from handmade import CONFIG, place

from gemscope import formats
from gemscope.errors import InputError
from gemscope.sites import Site, Stream

pytestmark = pytest.mark.usefixtures("unchecked")

SITE = Site(1, Stream.RESID_POST)


def test_a_folder_without_weights_is_told_what_to_hold(tmp_path):
    folder = place(tmp_path / "a")
    (folder / "params.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights in .* holds .*params\.safetensors"):
        formats.read(folder)


def test_a_missing_config_is_named_where_one_is_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"config\.json cannot be read: No such file"):
        formats.read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 50_000, "cannot be read as JSON"),
        (b"[]", "holds list, not an object"),
        (b"null", "holds NoneType, not an object"),
        (b"{}", "lacks affine_connection, architecture, .*, width"),
        (b'{"a": 1, "a": 2}', "has a twice: keep the one that is meant"),
        (b'{"a\\nb": 1, "a\\nb": 2}', r"has 'a\\nb' twice"),
        (b'{"a": ' * 99 + b"1" + b"}" * 99, "lacks affine_connection"),
        (b'{"a": ' * 101 + b"1" + b"}" * 101, "is nested too deeply for a configuration"),
        (b'{"l0": 1%s}' % (b"0" * 5_000), "cannot be read as JSON"),
        (b"{}" + b" " * 2**20, "is too large for a configuration"),
    ],
)
def test_a_config_that_is_not_an_object_is_refused(tmp_path, text, match):
    folder = place(tmp_path / "a")
    (folder / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=match):
        formats.read_config(folder)
    # One that is there has to be right, whatever the folder would be without it.
    with pytest.raises(InputError, match=match):
        formats.read(folder)


@pytest.mark.parametrize("name", list(CONFIG))
def test_a_missing_key_is_named(tmp_path, name):
    config = {n: v for n, v in CONFIG.items() if n != name}
    with pytest.raises(InputError, match=f"lacks {name}$"):
        formats.read_config(place(tmp_path / "a", config=config))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": "3"}, "width is '3', not int"),
        ({"width": 3.0}, "width is 3.0, not int"),
        ({"width": True}, "width is True, not int"),
        ({"width": False}, "width is False, not int"),
        ({"width": None}, "width is None, not int"),
        ({"l0": "2"}, "l0 is '2', not float"),
        ({"l0": True}, "l0 is True, not float"),
        ({"l0": False}, "l0 is False, not float"),
        ({"l0": [2]}, r"l0 is \[2\], not float"),
        ({"l0": 0}, "l0 is 0, not between 0 and width 3"),
        ({"l0": -1.0}, "l0 is -1.0, not between"),
        ({"l0": 4}, "l0 is 4, not between"),
        ({"l0": math.nan}, "l0 is nan, not between"),
        ({"l0": math.inf}, "l0 is inf, not between"),
        ({"l0": 10**400}, r"l0 is 1000+\.\.\.0+, not between"),
        ({"l0": -(10**400)}, r"l0 is -1000+\.\.\.0+, not between"),
        ({"width": 10**400}, r"width is 1000+\.\.\.0+, larger than anything"),
        ({"width": -(2**63)}, r"width is -\d+, larger than anything"),
        ({"width": [[[[[[[[[3]]]]]]]]]}, r"width is \[+\.\.\.\]+, not int"),
        ({"model_name": "a\nb"}, r"model_name is 'a\\nb', not a line of text"),
        ({"model_name": "\ud800"}, r"model_name is '\\ud800', not a line of text"),
        ({"type": "x" * 5_000}, r"type is 'x+\.\.\.x+', not a line of text"),
        ({"affine_connection": 0}, "affine_connection is 0, not bool"),
        ({"affine_connection": "false"}, "affine_connection is 'false', not bool"),
        ({"model_name": 3}, "model_name is 3, not str"),
        ({"model_name": None}, "model_name is None, not str"),
        ({"hf_hook_point_in": ["x"]}, "hf_hook_point_in is .*, not str"),
        ({"type": "cross"}, "type 'cross' is not one of sae, transcoder, crosscoder, clt"),
        ({"architecture": "topk"}, "architecture 'topk' is not jump_relu"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path, change, match):
    with pytest.raises(InputError, match=match) as refused:
        formats.read_config(place(tmp_path / "a", config=CONFIG | change))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("hook", "match"),
    [
        ("model.layers.1.outptu", "no site is called 'model.layers.1.outptu'"),
        ("model.layers.{1}.output", "is of several layers, and there are no files of layers"),
        ("", "no site is called ''"),
    ],
)
def test_a_hook_that_names_no_site_is_told_with_its_file(tmp_path, hook, match):
    config = CONFIG | {"hf_hook_point_in": hook, "hf_hook_point_out": hook}
    with pytest.raises(InputError, match=rf"a/config\.json: .*{match}"):
        formats.inspect(place(tmp_path / "a", config=config))


def test_a_site_under_two_names_is_one(tmp_path):
    config = CONFIG | {"hf_hook_point_out": "model.layers.01.output"}
    assert formats.inspect(place(tmp_path / "a", config=config)).writes == SITE


def test_a_whole_number_serves_as_l0_and_other_keys_are_left_out(tmp_path):
    folder = place(tmp_path / "a", config=CONFIG | {"l0": 2, "note": "hello"})
    config = formats.read_config(folder)
    assert asdict(config) == CONFIG
    assert type(config.l0) is float


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gemma-v3-1b-pt", "google/gemma-3-1b-pt"),
        ("gemma-v3-27b-it", "google/gemma-3-27b-it"),
        ("gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("google/gemma-3-12b-pt", "google/gemma-3-12b-pt"),
        ("gemma-v3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m-pt", "google/gemma-3-270m"),
        ("gemma-v3-270m-it", "google/gemma-3-270m-it"),
        ("someone/my-gemma-3-1b-pt", "someone/my-gemma-3-1b-pt"),
    ],
)
def test_the_model_is_called_by_its_name_on_the_hub(tmp_path, written, meant):
    folder = place(tmp_path / "a", config=CONFIG | {"model_name": written})
    assert formats.read_config(folder).model_name == meant
