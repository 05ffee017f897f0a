"""dictionary_learning's files: tensors out of a pickle, and nothing else, whatever it asks for."""

import json
import math
import zipfile

import pytest
import torch
from golden_layouts import TRAINER, WRONG, D, F, dictionary_learning, drawn, linear, refused, told

W, _ = drawn()
BATCH_TOP_K = linear(W, bias="b_dec") | {
    "k": torch.tensor(7, dtype=torch.int),
    "threshold": torch.tensor(1.5),
}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({n: t for n, t in BATCH_TOP_K.items() if n != "encoder.bias"}, "lacks encoder.bias; it"),
        ({n: t for n, t in BATCH_TOP_K.items() if n != "threshold"}, "lacks threshold; it has"),
        (BATCH_TOP_K | {"gate_bias": torch.zeros(F)}, "has 'gate_bias', which has no place"),
        (BATCH_TOP_K | {"threshold": torch.tensor(-1.0)}, "training has not measured it"),
        (BATCH_TOP_K | {"threshold": torch.tensor(math.nan)}, "threshold holds NaN"),
        (BATCH_TOP_K | {"threshold": -torch.ones(F)}, "threshold has negative entries"),
        (BATCH_TOP_K | {"threshold": torch.ones(3)}, r"threshold is \[3\], not one number or \[48"),
        (BATCH_TOP_K | {"b_dec": torch.zeros(3)}, r"b_dec is \[3\] .* ask for \[16\]"),
        (BATCH_TOP_K | {"encoder.weight": torch.ones(3)}, r"w_enc has shape \[3\]"),
        (
            BATCH_TOP_K | {"encoder.weight": torch.full((F, D), math.nan)},
            "w_enc holds NaN or infinity",
        ),
        (BATCH_TOP_K | {"encoder.bias": torch.zeros(F).double()}, "encoder.bias is float64, not"),
        (BATCH_TOP_K | {"encoder.bias": torch.zeros(F).long()}, "encoder.bias is int64, not"),
        (BATCH_TOP_K | {"encoder.bias": torch.zeros(1).expand(F)}, "larger than its bytes"),
        (BATCH_TOP_K | {"encoder.bias": torch.zeros(F).to_sparse()}, "is no plain tensor"),
        (BATCH_TOP_K | {"encoder.bias": torch.zeros(F, device="meta")}, "is no plain tensor"),
        (BATCH_TOP_K | {"encoder.bias": [0.0] * F}, "holds no tensors by name"),
        ({0: torch.zeros(2)}, "holds no tensors by name"),
        ([torch.zeros(2)], "holds no tensors by name"),
        ({}, "lacks encoder.weight, .*; it has nothing"),
    ],
)
def test_a_state_that_is_no_dictionarys_is_refused(tmp_path, state, match):
    refused(dictionary_learning(tmp_path, state), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dict_class": "GatedAutoEncoder"}, "says dict_class 'GatedAutoEncoder', which cannot be"),
        ({"dict_class": "CrossCoder"}, "readable are AutoEncoder, AutoEncoderNew"),
        ({"dict_class": "AutoEncoderTopK", "k": 8}, "says k 8, ae.pt says 7"),
        ({"activation_dim": 8}, "says activation_dim 8, the weights have 16"),
        ({"dict_size": 8}, "says dict_size 8, the weights have 48"),
        ({"layer": 6}, "says layer 6 and submodule_name 'resid_post_layer_5'"),
        ({"layer": -5, "submodule_name": "mlp_out"}, "says layer -5"),
    ],
)
def test_a_trainer_that_contradicts_is_told(tmp_path, changes, match):
    refused(dictionary_learning(tmp_path, BATCH_TOP_K, **changes), match)


@pytest.mark.parametrize("k", [torch.tensor(7.0), torch.tensor([7, 7]), torch.tensor(0)])
def test_a_k_that_is_none_is_refused(tmp_path, k):
    folder = dictionary_learning(
        tmp_path, BATCH_TOP_K | {"k": k}, dict_class="AutoEncoderTopK", k=None
    )
    refused(folder, "k is no whole number|k is 0, not between")


def test_no_value_of_a_trainer_does_worse_than_be_refused(tmp_path):
    folder = dictionary_learning(tmp_path, BATCH_TOP_K)
    for name in TRAINER:
        for value in WRONG:
            config = {"trainer": TRAINER | {name: value}}
            (folder / "config.json").write_text(json.dumps(config))
            assert "\n" not in (told(folder) or "")
    (folder / "config.json").write_text('{"trainer": [1]}')
    refused(folder, r"trainer is \[1\], not dict")
    (folder / "config.json").unlink()
    refused(folder, "config.json cannot be read")


class Caller:
    """A pickle that calls something when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_asks_for_more_than_tensors_is_refused_and_not_run(tmp_path):
    call = Caller(tmp_path / "made")
    for count, (state, asked) in enumerate(
        (
            (call, "io.open"),
            (BATCH_TOP_K | {"encoder.bias": call}, "io.open"),
            (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        )
    ):
        folder = dictionary_learning(tmp_path / str(count), state)
        refused(folder, f"weights alone, it asks for {asked}, and nothing else .* is ever loaded")
    assert not (tmp_path / "made").exists()


def rewritten(folder, change):
    """`ae.pt` again, its members changed by `change(name, data) -> data`."""
    path = folder / "ae.pt"
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))
    return folder


def test_a_file_that_is_no_whole_zip_is_refused(tmp_path):
    folder = dictionary_learning(tmp_path, BATCH_TOP_K)
    sound = (folder / "ae.pt").read_bytes()
    for length in (0, 1, 100, len(sound) // 2, len(sound) - 1):
        (folder / "ae.pt").write_bytes(sound[:length])
        refused(folder, "is not a file that torch.save writes, or it is cut short")
    torch.save(BATCH_TOP_K, folder / "ae.pt", _use_new_zipfile_serialization=False)
    refused(folder, "is not a file that torch.save writes")


def test_sizes_in_the_zip_are_checked_before_anything_is_loaded(tmp_path):
    folder = dictionary_learning(tmp_path / "a", BATCH_TOP_K)
    with zipfile.ZipFile(folder / "ae.pt", "a") as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
        info.file_size = info.compress_size = 2**40
        archive._didModify = True
    refused(folder, r"/data/0' claims 1,099,511,627,776 bytes, compressed or more than a file of")

    folder = dictionary_learning(tmp_path / "b", BATCH_TOP_K)
    with zipfile.ZipFile(folder / "ae.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ae/data/99", bytes(2**20))
    refused(folder, "ae/data/99' claims 1,048,576 bytes, compressed")

    folder = dictionary_learning(tmp_path / "c", BATCH_TOP_K)
    with zipfile.ZipFile(folder / "ae.pt", "a") as archive, pytest.warns(match="Duplicate name"):
        archive.writestr("ae/data/0", b"x")
    refused(folder, "members, or one of them twice")

    folder = dictionary_learning(tmp_path / "d", BATCH_TOP_K)
    padded = rewritten(folder, lambda n, d: d + bytes(2**20) if n.endswith(".pkl") else d)
    refused(padded, r"data.pkl' claims 1,0\d\d,\d{3} bytes")


def test_a_tensor_that_claims_more_than_its_bytes_is_refused(tmp_path):
    """48 x 16 numbers of the encoder, of which the pickle says that they are many more."""
    claims = {b"M\x00\x03": b"J\xff\xff\xff\x7f", b"K0K\x10\x86": b"J\xff\xff\xff\x0fK\x10\x86"}
    for count, (was, now) in enumerate(claims.items()):
        folder = dictionary_learning(tmp_path / str(count), BATCH_TOP_K)
        changed = []

        def claim(name, data, was=was, now=now, changed=changed):
            changed.append(was in data)
            return data.replace(was, now) if name.endswith(".pkl") else data

        rewritten(folder, claim)
        assert any(changed)
        refused(folder, r"claim [\d,]+ bytes|cannot be read as weights alone|larger than its bytes")
