"""The report of a run, the floor of a step, and the services that metrics go to."""

import json
import re
import shutil
import sys
import types

import pytest
import torch

from gemscope.corpus import read_text
from gemscope.errors import InputError
from gemscope.sae import screens_pay
from gemscope.sites import Site
from gemscope.train import (
    Machine,
    floor_seconds,
    measure_machine,
    parse_config,
    train,
    write_training_report,
)
from gemscope.train._curves import Curve, _layout, curves

RAW = {
    "model": "miniature",
    "data": {"text": "miniature", "tokens": 1_536, "context": 64, "batch": 256, "buffer": 1_024},
    "recipe": {
        "d_sae": 64,
        "l0": 8,
        "optimizer": {"lr": 1e-3, "warm_up": 3},
        "sparsity": {"warm_up": 5, "bandwidth": 0.05, "threshold": None, "start_l0": 16},
    },
    "artefacts": [
        {"reads": "2.resid_post", "name": "plain"},
        {"reads": "2.mlp_in", "writes": "2.mlp_out", "affine": True, "name": "skipping"},
    ],
}


def config(out, text="miniature", **changes):
    data = RAW["data"] | {"text": str(text)}
    return parse_config(RAW | {"out": str(out), "data": data} | changes, source="the test")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text that is read quickly."""
    file = tmp_path_factory.mktemp("text") / "some.txt"
    file.write_text(next(iter(read_text("miniature"))).text[:12_000])
    return file


@pytest.fixture(scope="module")
def finished(miniature, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    chosen = config(folder, text, evaluate={"every": 3, "tokens": 128})
    told = []
    assert train(chosen, model=miniature, begun=told.append) == folder
    assert told[0].seconds > 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_the_report_says_what_the_run_measured(finished):
    told = json.loads((finished / "report.json").read_text())
    assert (told["step"], told["steps"], told["tokens"]) == (6, 6, 1_536)
    assert told["sites"] == ["2.resid_post", "2.mlp_in", "2.mlp_out"]
    plain, skipping = told["artefacts"]
    assert (plain["name"], plain["kind"], plain["target_l0"]) == ("plain", "sae", 8)
    assert (skipping["kind"], skipping["reads"], skipping["writes"]) == (
        "transcoder", "2.mlp_in", "2.mlp_out",
    )  # fmt: skip
    lines = (finished / "metrics" / "plain.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert [plain[k] for k in ("l0", "fvu", "dead")] == [last[k] for k in ("l0", "fvu", "dead")]
    looks = map(json.loads, (finished / "evaluations.jsonl").read_text().splitlines())
    (look,) = [x for x in looks if x["name"] == "plain" and x["step"] == 6]
    assert plain["held_out"]["delta_loss"] == look["delta_loss"]
    assert told["config"]["artefacts"][0]["sparsity"]["start_l0"] == 16


def test_sections_make_up_a_step_and_the_ratio_is_to_the_largest_term(finished):
    found = json.loads((finished / "report.json").read_text())["time"]
    assert sum(s["share"] for s in found["sections"]) == pytest.approx(1, abs=0.01)
    assert sum(s["per_step"] for s in found["sections"]) == pytest.approx(found["per_step"])
    floor = found["floor"]
    assert floor["seconds"] == max(floor[n] for n in ("products", "parameters", "inputs"))
    assert found["ratio"] == pytest.approx(found["per_step"] / floor["seconds"])


def test_the_page_stands_alone_and_the_text_has_the_same_figures(finished):
    page = (finished / "report.html").read_text()
    assert not re.search(r"<script|<link|<img|src=|url\((?!#)", page)
    assert "<svg" in page
    text = (finished / "report.md").read_text()
    plain = json.loads((finished / "report.json").read_text())["artefacts"][0]
    for figure in (f"{plain['fvu']:.4g}", f"{plain['held_out']['delta_loss']:.4g}"):
        assert figure in page
        assert figure in text
    assert "times the floor" in page
    assert "times the floor" in text
    assert (finished / "figures" / "curves.svg").read_text().startswith("<?xml")
    assert not list(finished.rglob("*.part"))


def test_a_report_can_be_made_again_from_the_folder(run, finished):
    names = ("report.md", "report.json", "report.html")
    for name in names:
        (run / name).unlink()
    assert write_training_report(run) == run / "report.html"
    for name in names:
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_an_unfinished_run_has_a_report_too(run):
    (run / "run.json").unlink()
    (run / "evaluations.jsonl").unlink()
    for file in (run / "metrics").iterdir():
        lines = file.read_text().splitlines()
        # Begun again after two steps, and cut off while writing.
        file.write_text("\n".join([*lines[:3], *lines[1:4], lines[4][:20]]))
    write_training_report(run)
    told = json.loads((run / "report.json").read_text())
    assert (told["step"], told["time"], told["artefacts"][0]["held_out"]) == (4, None, None)
    assert "unfinished, at step 4 of 6" in (run / "report.md").read_text()
    assert "unfinished, at step 4 of 6" in (run / "report.html").read_text()


def test_what_a_folder_says_is_escaped(run):
    told = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(told | {"model": "<b>|`x", "device": "<i>"}))
    page = write_training_report(run).read_text()
    assert "&lt;b&gt;" in page
    assert not re.search("<b>\\||<i>", page)
    assert "`` <b>¦`x, float32 ``" in (run / "report.md").read_text()


def test_a_folder_without_a_run_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="no config at"):
        write_training_report(tmp_path)
    shutil.rmtree(run / "metrics")
    with pytest.raises(InputError, match="has no metrics yet"):
        write_training_report(run)


def fabricated(listed):
    chosen = config("out", artefacts=listed)
    lines = [{"tokens": t, "fvu": 1 / t, "l0": 8.0, "dead": 0.0} for t in range(1, 500)]
    return [Curve(artefact=a, lines=lines, looks={}) for a in chosen.artefacts]


def test_curves_of_a_few_sites_are_laid_out_by_site_and_of_many_by_layer():
    by_site = {"reads": "{layer}.resid_post", "layer": [1, 2, 3], "d_sae": [64, 128], "l0": [4, 8]}
    rows = _layout(fabricated([by_site]))
    assert [heading for heading, _ in rows] == ["1.resid_post", "2.resid_post", "3.resid_post"]
    assert [m[0] for m in rows[0][1]] == ["64, L0 4", "64, L0 8", "128, L0 4", "128, L0 8"]
    assert len({m[2] for m in rows[0][1]}) == 4
    many = _layout(fabricated([by_site | {"layer": list(range(15))}]))
    assert [heading for heading, _ in many] == [
        f"resid_post   {w}, L0 {n}" for w in (64, 128) for n in (4, 8)
    ]
    assert [m[0] for m in many[0][1]] == [f"layer {i}" for i in range(15)]
    assert len({m[2] for m in many[0][1]}) == 15


def test_curves_keep_their_last_point_and_are_short():
    (curve,) = fabricated([{"reads": "1.resid_post"}])
    x, y = curve.series("fvu")
    assert (x[-1], y[-1]) == (499, 1 / 499)
    assert len(x) <= 160
    assert "<svg" in curves([curve])


MACHINE = Machine(product="float32", flop=1e9, bytes=1e6)


def floor_of(width=10, **of_artefact):
    chosen = config("out", artefacts=[{"d_sae": 60, **of_artefact}])
    return floor_seconds(chosen, dict.fromkeys(chosen.sites, width), MACHINE)


def test_the_floor_by_hand():
    sae = floor_of(reads="2.resid_post")
    assert sae.products == pytest.approx(2 * 256 * 10 * 60 / 1e9)
    assert sae.parameters == pytest.approx(20 * 2 * 10 * 60 / 1e6)
    assert sae.inputs == pytest.approx(256 * 10 * 4 / 1e6)
    assert (sae.seconds, sae.bound) == (sae.parameters, "parameters")
    moment = floor_of(reads="2.resid_post", optimizer={"beta1": 0.9})
    assert moment.parameters == pytest.approx(28 * 2 * 10 * 60 / 1e6)
    affine = floor_of(reads="2.mlp_in", writes="2.mlp_out", affine=True)
    assert affine.parameters == pytest.approx(20 * (2 * 10 * 60 + 10 * 10) / 1e6)
    assert affine.inputs == pytest.approx(2 * sae.inputs)
    # Three layers of 20 features: the first writes to three, the second to two, the last to one.
    clt = floor_of(reads="1-3.mlp_in", writes="1-3.mlp_out")
    assert clt.products == pytest.approx(sae.products)
    assert clt.parameters == pytest.approx(20 * (10 * 60 + 10 * 20 * (3 + 2 + 1)) / 1e6)


def test_artefacts_of_a_site_share_its_input_and_nothing_else():
    two = config("out", artefacts=[{"reads": "2.resid_post", "d_sae": [60, 30]}])
    found = floor_seconds(two, {Site.parse("2.resid_post"): 10}, MACHINE)
    one = floor_of(reads="2.resid_post")
    assert found.inputs == one.inputs
    assert found.products == pytest.approx(1.5 * one.products)
    assert found.parameters == pytest.approx(1.5 * one.parameters)


def test_the_machine_is_measured():
    chosen, cpu = config("out"), torch.device("cpu")
    found = measure_machine(chosen, dict.fromkeys(chosen.sites, 256), cpu)
    assert 1e7 < found.flop < 1e15
    assert 1e7 < found.bytes < 1e14
    assert found.product == ("bfloat16" if screens_pay(cpu) else "float32")


class Service(types.ModuleType):
    """A tracking service that keeps what it is told."""

    def __init__(self, fails=()):
        super().__init__("service")
        self.runs, self.sent, self.finished, self.fails = [], [], 0, fails

    def init(self, **given):
        self._maybe_fail("init")
        self.runs.append(given)

    def log(self, metrics, step):
        self._maybe_fail("log")
        self.sent.append((step, metrics))

    def finish(self):
        self.finished += 1

    def _maybe_fail(self, what):
        if what in self.fails:
            raise ConnectionError(f"no\n{what}")


def test_services_get_the_standings_and_a_failing_one_does_not_end_the_run(
    miniature, text, tmp_path, monkeypatch
):
    trackio, wandb = Service(), Service(fails=["log"])
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.warns(RuntimeWarning, match="wandb gets no more metrics: no\nlog") as told:
        train(config(tmp_path / "out", text, log=["trackio", "wandb"]), model=miniature)
    assert len([w for w in told if "no more metrics" in str(w.message)]) == 1
    (given,), (other,) = trackio.runs, wandb.runs
    assert (given["project"], given["resume"]) == ("gemscope", "allow")
    assert given["name"].startswith("out-2")
    assert given["config"]["data"]["batch"] == 256
    assert other == given | {"id": given["name"], "dir": str(tmp_path / "out")}
    assert [step for step, _ in trackio.sent] == [1, 2, 3, 4, 5, 6]
    lines = (tmp_path / "out" / "metrics" / "skipping.jsonl").read_text().splitlines()
    for (_, sent), line in zip(trackio.sent, map(json.loads, lines), strict=True):
        for key in ("loss", "fvu", "l0", "target", "dead"):
            assert sent[f"skipping/{key}"] == line[key]
    assert (trackio.finished, wandb.finished) == (1, 0)
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_service_that_is_missing_or_does_not_start_is_a_mistake(miniature, tmp_path, monkeypatch):
    chosen = config(tmp_path / "out", log=["trackio"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        InputError, match=r"trackio, which is not .* pip install 'gemscope\[trackio"
    ):
        train(chosen, model=miniature)
    monkeypatch.setitem(sys.modules, "trackio", Service(fails=["init"]))
    with pytest.raises(InputError, match="trackio did not start: no init; set it up"):
        train(chosen, model=miniature)
