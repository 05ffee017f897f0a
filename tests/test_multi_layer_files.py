"""Crosscoders and cross-layer transcoders: a file for each layer, read to the bit or refused."""

import json
import math
import time

import pytest
import torch
from handmade import (
    CLT,
    CONFIG,
    CROSSCODER,
    D_IN,
    D_OUT,
    D_SAE,
    LAYERS,
    SKIP,
    drawn,
    facts,
    fields,
    made,
    meant,
    part_of,
    place,
    place_layers,
    place_npz,
    same,
    whole,
)

from gemscope import formats
from gemscope.errors import InputError
from gemscope.sites import Site, Sites, Stream

pytestmark = pytest.mark.usefixtures("unchecked")


def sites(layers, stream):
    return Sites(Site(n, stream) for n in layers)


def refused(folder, match, use=formats.inspect):
    with pytest.raises(InputError, match=match) as error:
        use(folder)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500 + len(str(folder))


def changed(layer, **values):
    """`LAYERS`, with other tensors in one of them."""
    return [v | values if n == layer else v for n, v in enumerate(LAYERS)]


# What is read


@pytest.mark.parametrize(
    ("config", "reads", "writes"),
    [
        (CROSSCODER, sites((5, 9), Stream.RESID_POST), sites((5, 9), Stream.RESID_POST)),
        (CLT, sites((0, 1), Stream.MLP_IN), sites((0, 1), Stream.MLP_OUT)),
    ],
)
def test_a_folder_made_by_hand_is_read_right(tmp_path, config, reads, writes):
    folder = place_layers(tmp_path / "a", config=config)
    parts = formats.read(folder)
    assert len(parts) == len(LAYERS)
    for part, values in zip(parts, LAYERS, strict=True):
        assert same(fields(part), meant(values))
    # Feature 1 of the first layer writes to the second one: axis 1 is the layer written.
    assert parts[0].w_dec[1].tolist() == [[-3.0, 4.0], [7.0, 8.0]]
    assert formats.inspect(folder) == formats.Facts(
        layout="gemma-scope-2",
        kind=config["type"],
        d_in=2,
        d_sae=4,
        d_out=2,
        affine=False,
        activation="jumprelu",
        dtype="float32",
        files=tuple(folder / f"params_layer_{n}.safetensors" for n in range(2)),
        shapes={n: tuple(s) for n, (s, _) in LAYERS[0].items()},
        reads=reads,
        writes=writes,
        model="some/model",
        l0=2.0,
    )


def test_a_folder_without_a_config_is_read_and_says_less(tmp_path):
    folder = place_layers(tmp_path / "a", config=None)
    for part, values in zip(formats.read(folder), LAYERS, strict=True):
        assert same(fields(part), meant(values))
    found = formats.inspect(folder)
    assert (found.kind, found.reads, found.writes, found.model) == (None, None, None, None)
    assert (found.d_in, found.d_sae, found.d_out) == (2, 4, 2)


def test_skip_connections_are_read_for_each_layer(tmp_path):
    skips = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    layers = [v | {SKIP: ([2, 2], s)} for v, s in zip(LAYERS, skips, strict=True)]
    folder = place_layers(tmp_path / "a", layers, CLT | {"affine_connection": True})
    assert formats.inspect(folder).affine
    assert [p.skip.flatten().tolist() for p in formats.read(folder)] == skips


def test_layers_are_read_in_the_order_of_their_numbers(tmp_path):
    """Eleven of them: `params_layer_10` comes before `params_layer_2` by name."""
    layers = []
    for number in range(11):
        w_dec = [float(target >= number) for target in range(11)]
        layers.append({
            "w_enc": ([1, 1], [1.0]), "b_enc": ([1], [float(number)]),
            "w_dec": ([1, 11, 1], w_dec), "b_dec": ([1], [0.0]), "threshold": ([1], [0.5]),
        })  # fmt: skip
    folder = place_layers(tmp_path / "a", layers, CLT | {"width": 11})
    assert [p.b_enc.item() for p in formats.read(folder)] == list(range(11))
    assert formats.inspect(folder).reads == sites(range(11), Stream.MLP_IN)


@pytest.mark.parametrize("hook", ["{ 5, 9 }", "{05,09}"])
def test_layers_may_be_written_with_space(tmp_path, hook):
    hook = f"model.layers.{hook}.output"
    config = CROSSCODER | {"hf_hook_point_in": hook}
    found = formats.inspect(place_layers(tmp_path / "a", config=config))
    assert found.reads == found.writes == sites((5, 9), Stream.RESID_POST)


# Files that do not belong together


def test_a_missing_layer_is_named(tmp_path):
    folder = place_layers(tmp_path / "a")
    (folder / "params_layer_0.safetensors").rename(tmp_path / "kept")
    match = r"has 1 files of layers, and their decoders write 2: params_layer_0\.safetensors is mis"
    refused(folder, match)
    (folder / "params_layer_1.safetensors").unlink()
    (tmp_path / "kept").rename(folder / "params_layer_0.safetensors")
    refused(folder, match.replace("layer_0", "layer_1"))


@pytest.mark.parametrize("name", ["params_layer_2", "params_layer_7"])
def test_a_layer_too_many_is_told(tmp_path, name):
    folder = place_layers(tmp_path / "a")
    (folder / f"{name}.safetensors").write_bytes(whole(*made(LAYERS[1])))
    refused(folder, "has 3 files of layers, and their decoders write 2$")


@pytest.mark.parametrize("name", ["params_layer_00", "params_layer_01", "params_layer_\u0661"])
def test_a_number_that_nobody_writes_is_no_layer(tmp_path, name):
    folder = place_layers(tmp_path / "a")
    (folder / f"{name}.safetensors").write_bytes(b"nothing of ours")
    assert len(formats.read(folder)) == 2


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (
            changed(1, w_enc=([3, 1], [1.0, 2.0, 3.0])),
            "the layers of .* are of different widths",
        ),
        (
            changed(1, w_dec=([1, 2, 3], [0.0] * 6), b_dec=([3], [0.0] * 3)),
            "the layers of .* are of different widths",
        ),
        (
            changed(1, **{SKIP: ([2, 2], [1.0] * 4)}),
            "some layers of .* have affine_skip_connection and some have not",
        ),
        (
            changed(1, w_dec=([1, 3, 2], [0.0] * 6)),
            r"1\.safetensors: w_dec is \[1, 3, 2\] .* ask for \[1, 2, 2\]",
        ),
        (changed(1, w_dec=([1, 2], [0.0] * 2)), r"1\.safetensors: w_dec has shape \[1, 2\]"),
        (changed(1, b_enc=([2], [0.0] * 2)), r"1\.safetensors: b_enc is \[2\] .* ask for \[1\]"),
        (
            changed(0, w_dec=([3, 2], [0.0] * 6)),
            r"0\.safetensors: w_dec has shape \[3, 2\], not \[features, layers, d_out\]",
        ),
        (
            changed(0, w_dec=([3, 3, 2], [0.0] * 18)),
            r"has 2 files of layers, and their decoders write 3: params_layer_2\.safetensors is mi",
        ),
        (
            [{n: v for n, v in LAYERS[0].items() if n != "w_dec"}, LAYERS[1]],
            r"0\.safetensors lacks w_dec; it has",
        ),
    ],
)
def test_layers_that_contradict_each_other_are_told(tmp_path, layers, match):
    refused(place_layers(tmp_path / "a", layers, config=None), match)


@pytest.mark.parametrize("count", [10**6, 2**62])
def test_any_number_of_layers_may_be_claimed(tmp_path, count):
    """Tensors without a number take no bytes: such a claim costs a file nothing."""
    header, data = made({n: v for n, v in LAYERS[0].items() if n != "w_dec"})
    began = time.perf_counter()
    for shape in ([0, count, 2], [3, count, 0]):
        header["w_dec"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data)] * 2}
        folder = place_layers(tmp_path / "a", config=None)
        (folder / "params_layer_0.safetensors").write_bytes(whole(header, data))
        refused(folder, r"w_dec has shape \[")
    assert time.perf_counter() - began < 1


def test_a_million_layers_that_are_not_there_are_refused_at_once(tmp_path):
    values = LAYERS[0] | {"w_dec": ([1, 10**6, 1], [0.0] * 10**6)}
    folder = place_layers(tmp_path / "a", [values], config=None)
    refused(folder, r"has 1 files of layers, and their decoders write 1000000: params_layer_1\.saf")


def test_two_artefacts_in_one_folder_are_told(tmp_path):
    both = place(place_layers(tmp_path / "a"))
    refused(
        both, r"two artefacts: params\.safetensors and params_layer_0\.safetensors; keep one of the"
    )
    other = place_npz(place_layers(tmp_path / "b"))
    refused(other, r"several artefacts: params\.npz, params\.safetensors or params_layer_\*\.safe")


# Configs that say something else


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 3}, "says width 3, the weights are 4 wide"),
        ({"type": "sae"}, "says type sae, and there are 2 files of layers"),
        ({"type": "transcoder"}, "says type transcoder, and there are 2 files of layers"),
        ({"type": "clt"}, "a transcoder or clt not"),
        ({"affine_connection": True}, "affine_connection True, the parameters has no affine_skip"),
    ],
)
def test_a_config_of_something_else_is_told(tmp_path, change, match):
    refused(place_layers(tmp_path / "a", config=CROSSCODER | change), match)


def test_a_crosscoder_that_writes_elsewhere_is_told(tmp_path):
    config = CROSSCODER | {"hf_hook_point_out": CLT["hf_hook_point_out"].replace("all", "5,9")}
    refused(place_layers(tmp_path / "a", config=config), "an sae or crosscoder writes where it rea")
    config |= {"type": "clt"}
    assert formats.inspect(place_layers(tmp_path / "a", config=config)).kind == "clt"


def test_a_single_layer_of_a_multi_layer_type_is_told(tmp_path):
    refused(
        place(tmp_path / "a", config=CONFIG | {"type": "crosscoder"}),
        "says type crosscoder, and there are no files of layers",
    )


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ("{5}", "names 1 layers, and there are 2 files of layers"),
        ("{5,9,12}", "names 3 layers, and there are 2 files of layers"),
        ("{}", "names 1 layers, and there are 2 files"),
        ("{ }", "names 1 layers, and there are 2 files"),
        ("{5,}", r"no site is called 'model\.layers\.\.output'"),
        ("{5 9,1}", r"no site is called 'model\.layers\.5 9\.output'"),
        ("{5,-9}", "is of one layer, and there are 2 files of layers"),
        ("{5,5}", "5.resid_post, 5.resid_post are not sites of one stream in ascending layers"),
        ("{9,5}", "9.resid_post, 5.resid_post are not sites of one stream in ascending layers"),
        ("{5,99999}", r"no site is called 'model\.layers\.99999\.output'"),
        ("{5,%s}" % ("9" * 900), "no site is called"),
        ("{5-9}", "is of one layer, and there are 2 files of layers"),
        ("{5,\u0669}", "is of one layer, and there are 2 files of layers"),
        ("5", "is of one layer, and there are 2 files of layers"),
        ("{5,9}.{5,9}", "no site is called"),
        (f"{{{','.join('7' * 400)}}}", "names 400 layers, and there are 2 files of layers"),
    ],
)
def test_hooks_of_other_layers_are_told_with_their_file(tmp_path, layers, match):
    hook = f"model.layers.{layers}.output"
    config = CROSSCODER | {"hf_hook_point_in": hook, "hf_hook_point_out": hook}
    folder = place_layers(tmp_path / "a", config=config)
    with pytest.raises(InputError, match=rf"a/config\.json: .*{match}") as error:
        formats.inspect(folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("layers", ["{6,9}", "{all}"])
def test_other_layers_written_than_read_are_told(tmp_path, layers):
    """Axis 1 of the decoders counts the layers that are read: both must be the same."""
    hook = f"model.layers.{layers}.post_feedforward_layernorm.output"
    config = CROSSCODER | {"type": "clt", "hf_hook_point_out": hook}
    match = r"config\.json reads 5,9\.resid_post and writes .*mlp_out: they must be of the same lay"
    refused(place_layers(tmp_path / "a", config=config), match)


# Decoders that write backwards


def causal(generator, n_layers=4, count=6, d=5):
    """The decoders of a model, `[count, n_layers, d]` each, zero before their own layer."""
    drawn = [torch.randn(count, n_layers, d, generator=generator) for _ in range(n_layers)]
    return [w * (torch.arange(n_layers) >= source)[:, None] for source, w in enumerate(drawn)]


def with_decoders(folder, decoders):
    layers = []
    for w in decoders:
        count, _, d = w.shape
        layers.append({
            "w_enc": ([1, count], [1.0] * count), "b_enc": ([count], [0.0] * count),
            "w_dec": (list(w.shape), w.flatten().tolist()), "b_dec": ([d], [0.0] * d),
            "threshold": ([count], [0.0] * count),
        })  # fmt: skip
    return place_layers(folder, layers, config=None)


def test_decoders_counted_from_their_own_layer_are_refused(tmp_path, generator):
    """Some libraries store `target - source` on axis 1: read as it is, that would be nonsense."""
    decoders = causal(generator)
    assert len(formats.read(with_decoders(tmp_path / "sound", decoders))) == 4
    for source in (1, 2, 3):
        shifted = [w.roll(-source, 1) if n == source else w for n, w in enumerate(decoders)]
        folder = with_decoders(tmp_path / str(source), shifted)
        match = (
            rf"layer_{source}\.safetensors: [\d.]+% of the decoder writes to layers before its own"
        )
        refused(folder, match, formats.read)


@pytest.mark.parametrize("feature", [0, 3, 5])
def test_one_feature_that_writes_backwards_is_refused(tmp_path, generator, feature):
    decoders = causal(generator)
    decoders[2][feature, 1] = 0.5
    refused(
        with_decoders(tmp_path / "a", decoders), "layer_2.* of the decoder writes", formats.read
    )


def test_a_backward_decoder_of_large_numbers_is_refused(tmp_path, generator):
    """In float32, their squares would be infinite, and the share of them no number."""
    decoders = [w * 1e25 for w in causal(generator)]
    assert len(formats.read(with_decoders(tmp_path / "sound", decoders))) == 4
    decoders[3] = decoders[3].flip(1)
    refused(with_decoders(tmp_path / "a", decoders), "layer_3.* of the decoder", formats.read)


@pytest.mark.parametrize(("noise", "sound"), [(1e-9, True), (1e-4, True), (1e-2, False)])
def test_noise_is_no_feature(tmp_path, generator, noise, sound):
    """Shares are of squares: noise of 1e-4 has 1e-8 of them, of 1e-2 about 1e-4."""
    decoders = causal(generator)
    largest = decoders[3].abs().max()
    decoders[3][:, :3] = largest * noise
    folder = with_decoders(tmp_path / "a", decoders)
    if sound:
        # Noise is read as it is.
        assert torch.equal(formats.read(folder)[3].w_dec, decoders[3])
    else:
        refused(folder, "layer_3.* of the decoder writes", formats.read)


def test_a_decoder_of_zeros_is_read(tmp_path, generator):
    decoders = [w * 0 for w in causal(generator)]
    assert not any(p.w_dec.any() for p in formats.read(with_decoders(tmp_path / "a", decoders)))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_decoder_that_is_not_finite_is_refused(tmp_path, place, number):
    layers = changed(1, w_dec=([1, 2, 2], [number if n // 2 == place else 1.0 for n in range(4)]))
    refused(place_layers(tmp_path / "a", layers), "of the decoder|w_dec holds NaN", formats.read)


# What is written


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("reads", "writes"),
    [
        (sites((0, 1, 2), Stream.MLP_IN), sites((0, 1, 2), Stream.MLP_OUT)),
        (sites((3, 7, 11), Stream.RESID_POST), sites((3, 7, 11), Stream.RESID_POST)),
    ],
)
def test_what_is_written_is_read_back_exactly(tmp_path, generator, reads, writes, dtype, affine):
    tensors = [drawn(generator, dtype, affine=affine, n_layers=3) for _ in range(3)]
    for source, t in enumerate(tensors):
        t["w_dec"][:, :source] = 0
    config = facts(
        type="crosscoder" if reads == writes else "clt",
        width=3 * D_SAE,
        affine_connection=affine,
        hf_hook_point_in=formats.hook_of(reads, "some/model"),
        hf_hook_point_out=formats.hook_of(writes, "some/model"),
    )
    formats.write_gemma_scope_2(tmp_path / "new" / "a", config, [part_of(t) for t in tensors])
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a"]
    files = sorted(f.name for f in (tmp_path / "new" / "a").iterdir())
    assert files == ["config.json", *(f"params_layer_{n}.safetensors" for n in range(3))]
    parts = formats.read(tmp_path / "new" / "a")
    assert all(same(fields(p), t) for p, t in zip(parts, tensors, strict=True))
    found = formats.inspect(tmp_path / "new" / "a")
    assert (found.reads, found.writes) == (reads, writes)
    assert (found.d_in, found.d_sae, found.d_out) == (D_IN, 3 * D_SAE, D_OUT)
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert (tmp_path / "new" / "a" / files[1]).stat().st_mode & 0o044 == 0o044


def test_a_failed_write_leaves_nothing_behind(tmp_path, generator):
    tensors = [drawn(generator, torch.float32, affine=False, n_layers=2) for _ in range(2)]
    config = facts(
        type="crosscoder", width=2 * D_SAE, hf_hook_point_in=CROSSCODER["hf_hook_point_in"],
        hf_hook_point_out=CROSSCODER["hf_hook_point_out"],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"/a/params_layer_1\.safetensors: [\d.]+% of the decoder"):
        formats.write_gemma_scope_2(tmp_path / "a", config, [part_of(t) for t in tensors])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sites", "hook"),
    [
        (Site(7, Stream.RESID_POST), "model.layers.7.output"),
        (Sites([Site(7, Stream.RESID_POST)]), "model.layers.{7}.output"),
        (sites((5, 9, 12, 15), Stream.RESID_POST), "model.layers.{5,9,12,15}.output"),
        (sites((0, 1), Stream.ATTN_HEADS), "model.layers.{0,1}.self_attn.o_proj.input"),
    ],
)
def test_hooks_are_called_as_in_the_published_files(sites, hook):
    assert formats.hook_of(sites, "google/gemma-3-1b-pt") == hook
    assert formats.hook_of(sites, None) == hook
    with pytest.raises(InputError, match="has no name in Gemma Scope 2's layout; mlp_in has"):
        formats.hook_of(Site(3, Stream.MLP_IN_UNSCALED), None)


def test_configs_are_written_by_the_letter(tmp_path):
    folder = place_layers(tmp_path / "a")
    config = formats.read_config(folder)
    formats.write_gemma_scope_2(tmp_path / "b", config, formats.read(folder))
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == CROSSCODER
    assert formats.read_config(tmp_path / "b") == config
