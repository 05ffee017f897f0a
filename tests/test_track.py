"""Features across layers, and whether what they are said to come from causes them."""

import json

import numpy as np
import pytest
import torch
from planted import brute_counts, planted

from gemscope.errors import InputError
from gemscope.features import Store
from gemscope.hub import load_sae
from gemscope.relate import Limits, ablate, from_store, layers_of, track_step, wilson

N = 3_000
LINK = {
    "before", "after", "kind", "change", "cosine", "phi", "together", "after_given_before",
    "before_given_after",
}  # fmt: skip


def answer(done):
    code, out, err = done
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def step(tmp_path):
    """0 to 0 passed on; 1 to 1 turned; 2 to 2 fires elsewhere; 3 vanishes; 4 is born; 5 is rare."""
    rng = np.random.default_rng(0)
    before, after = np.zeros((N, 6)), np.zeros((N, 6))
    for f in range(5):
        before[f * 200 : (f + 1) * 200, f] = 1
    after[10:200, 0] = after[200:390, 1] = 1
    after[1_500:1_700, 2] = after[2_000:2_300, 4] = 1
    before[:, 4] = 0
    before[:5, 5] = after[:5, 5] = 1
    v = np.linalg.qr(rng.normal(size=(16, 16)))[0][:12]
    w = v[6:].copy()
    w[0], w[2] = v[0] + 0.2 * v[6], v[2]
    where = {"two": "2.resid_post", "three": "3.resid_post"}
    return planted(
        tmp_path, {"two": before, "three": after}, {"two": v[:6], "three": w}, writes=where
    )


def test_planted_fates_are_found(step):
    found = track_step(*step)
    kinds = {j: (link.before, link.kind, link.change) for j, link in found.links.items()}
    assert kinds == {
        0: (0, "passed on", None),
        1: (1, "transformed", "direction"),
        2: (2, "transformed", "firing"),
    }
    assert (found.born, found.vanished) == ([4], [3])
    assert found.counts == {"passed on": 1, "transformed": 2, "born": 1, "vanished": 1}
    # 4 and 5 of the earlier layer fire too seldom to be followed, 3 and 5 of the later.
    assert found.silent == (2, 2)
    assert found.layers == (2, 3)
    link = found.links[0].json()
    assert link.keys() == LINK
    assert link["together"] == 190
    low, high = wilson(190, 200)
    assert link["after_given_before"] == {"value": 0.95, "low": low, "high": high}
    assert link["before_given_after"]["value"] == 1
    assert link["cosine"] == pytest.approx(1 / np.hypot(1, 0.2))


def test_limits_are_settings(step):
    strict = track_step(*step, Limits(cosine=0.99))
    assert strict.links[0].change == "degree"
    loose = track_step(*step, Limits(phi=0.1, cosine=-1.0, loose_phi=0.1, loose_cosine=-1.0))
    assert loose.born == []
    assert track_step(*step, Limits(least=4)).silent == (1, 1)


def test_a_real_step_is_what_brute_force_gives(small_store, indexed):
    store = Store.open(small_store)
    one, two = (from_store(store, a) for a in indexed)
    found, limits = track_step(one, two), Limits()
    a, b = (x.vectors / np.linalg.norm(x.vectors, axis=1)[:, None] for x in (one, two))
    cosine, both, n = a @ b.T, brute_counts(one, two).astype(float), one.tokens
    x, y = one.fired[:, None].astype(float), two.fired[None].astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        phi = np.nan_to_num((both * n - x * y) / np.sqrt(x * (n - x) * y * (n - y)))
    judged = (one.fired >= limits.least)[:, None] & (two.fired >= limits.least)[None]
    passed = (cosine >= limits.cosine) & (phi >= limits.phi) & judged
    some = ((cosine >= limits.loose_cosine) | (phi >= limits.loose_phi)) & judged
    alive = two.fired >= limits.least
    assert found.counts == {
        "passed on": int(passed.any(0).sum()),
        "transformed": int((some.any(0) & ~passed.any(0)).sum()),
        "born": int((alive & ~some.any(0)).sum()),
        "vanished": int(((one.fired >= limits.least) & ~some.any(1)).sum()),
    }
    assert all(
        passed[link.before, j] for j, link in found.links.items() if link.kind == "passed on"
    )
    for j, link in list(found.links.items())[:20]:
        assert link.together == both[link.before, j]
        assert link.phi == pytest.approx(phi[link.before, j])


# --- cause ------------------------------------------------------------------------------------


def passed_on(store, indexed):
    one, two = (from_store(store, a) for a in indexed)
    links = track_step(one, two).links.values()
    best = max((k for k in links if k.kind == "passed on" and k.together > 40), key=lambda k: k.phi)
    return one, two, (best.before, best.after)


def test_ablating_a_predecessor_is_what_a_hook_by_hand_does(small_store, indexed, miniature):
    one, two, (i, j) = passed_on(Store.open(small_store), indexed)
    saes = [load_sae(a) for a in indexed]
    found = ablate(miniature, *saes, one, two, (i, j), contexts=3, controls=2)
    text = one.activations.text
    places = np.intersect1d(*(x.activations.of(x.address, f)[0] for x, f in ((one, i), (two, j))))
    of = text.context_of(places)
    chosen = np.random.default_rng(0).permutation(np.unique(of))[:3]
    clean, left = [], []
    before, after = saes
    for context in chosen.tolist():
        first, stop = text.offsets[context : context + 2].tolist()
        ids = torch.from_numpy(text.ids[first:stop].astype(np.int64))[None]
        counts = torch.from_numpy(text.counts[first:stop])

        def edit(_module, _inputs, output, counts=counts):
            x = output[0] if isinstance(output, tuple) else output
            pre = x[0] @ before.w_enc[:, i].float() + before.b_enc[i]
            fires = (pre > before.activation.threshold[i]) & counts
            x = x - (pre * fires)[None, :, None] * before.w_dec[i].float()
            return (x, *output[1:]) if isinstance(output, tuple) else x

        for out, hooked in ((clean, False), (left, True)):
            layers = miniature.hf.model.layers
            handle = layers[before.reads.layer].register_forward_hook(edit) if hooked else None
            with torch.no_grad():
                states = miniature.hf(ids, output_hidden_states=True).hidden_states
            if handle is not None:
                handle.remove()
            x = states[after.reads.layer + 1][0]
            pre = x @ after.w_enc[:, j].float() + after.b_enc[j]
            out += pre[places[of == context] - first].tolist()
    clean, left = np.array(clean), np.array(left)
    assert found.tokens == len(clean)
    assert found.drop == pytest.approx((clean - left).mean() / clean.mean(), rel=1e-3)
    threshold = float(after.activation.threshold[j])
    assert found.silenced == pytest.approx((left <= threshold).mean())
    # What has its direction and fires with it does cause it; others do not.
    assert found.drop > 0.3 > abs(found.control_drop)
    assert i not in found.controls


def test_the_check_needs_saes_and_tokens_in_common(small_store, indexed, miniature, tmp_path):
    one, two, pair = passed_on(Store.open(small_store), indexed)
    transcoder = load_sae("miniature/transcoder_all/layer_3_width_192_l0_small")
    with pytest.raises(InputError, match="needs SAEs, not transcoders"):
        ablate(miniature, transcoder, load_sae(indexed[1]), one, two, pair)
    apart = brute_counts(one, two)
    i, j = (int(v) for v in np.argwhere((apart == 0) & (one.fired > 0)[:, None])[0])
    with pytest.raises(InputError, match="fire on no token together"):
        ablate(miniature, load_sae(indexed[0]), load_sae(indexed[1]), one, two, (i, j))


# --- the command ------------------------------------------------------------------------------


def test_layers_are_those_of_one_series(small_store, indexed):
    store = Store.open(small_store)
    assert [d["address"] for d in layers_of(store, like=indexed[1])] == list(indexed)
    assert [d["address"] for d in layers_of(store, stream="resid_post")] == list(indexed)


def test_track_follows_all(command, small_store, indexed, tmp_path):
    (found,) = answer(command("track", small_store, "--stream", "resid_post", "--json"))
    assert found.keys() == {"before", "after", "counts", "silent", "links", "born", "vanished"}
    assert (found["before"], found["after"]) == indexed
    assert sum(found["counts"][k] for k in ("passed on", "transformed", "born")) == (
        384 - found["silent"]["after"]
    )
    file = tmp_path / "t.png"
    code, out, _ = command("track", small_store, "--like", indexed[0], "--plot", file)
    assert code == 0
    assert "2 to 3" in out
    assert file.stat().st_size > 5_000


def test_track_follows_one_both_ways(command, small_store, indexed):
    (step,) = answer(command("track", small_store, "--stream", "resid_post", "--json"))
    link = next(k for k in step["links"] if k["kind"] == "passed on")
    up = answer(command("track", small_store, f"{indexed[0]}/{link['before']}", "--json"))
    assert up.keys() == {"dictionary", "feature", "born", "vanished", "stages"}
    assert [s["layer"] for s in up["stages"]] == [2, 3]
    down = answer(command("track", small_store, f"{indexed[1]}/{link['after']}", "--json"))
    assert [s["feature"] for s in down["stages"]] == [link["before"], link["after"]]
    assert down["stages"][1]["link"] == link
    assert down["born"] is down["vanished"] is None
    born = answer(command("track", small_store, f"{indexed[1]}/{step['born'][0]}", "--json"))
    assert (born["born"], len(born["stages"])) == (3, 1)
    gone = answer(command("track", small_store, f"{indexed[0]}/{step['vanished'][0]}", "--json"))
    assert gone["vanished"] == 2
    code, out, err = command(
        "track", small_store, f"{indexed[1]}/{link['after']}", "--check", "--contexts", 2
    )
    assert code == 0, err
    assert "drop (control)" in out


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ([], "nothing to follow: give ADDRESS/FEATURE"),
        (["{0}"], "names no feature: write ADDRESS/INDEX|is not indexed"),
        (["{0}/999"], "no feature 999"),
        (["nothing/3"], "nothing is not indexed"),
        (
            ["--stream", "mlp_out"],
            "no dictionary of mlp_out is indexed .*; nearest: resid",
        ),
        (["--stream", "mlp_out", "--like", "{0}"], "does not read mlp_out"),
        (["{0}/3", "--stream", "resid_post"], "--stream, --like and --plot are for all features"),
        (["--stream", "resid_post", "--check"], "--check ablates the predecessors of one feature"),
        (["--stream", "resid_post", "--phi", "0.1"], "below --cosine and --phi"),
        (["--stream", "resid_post", "--plot", "t.gif"], "written as .svg, .png or .pdf"),
    ],
)
def test_track_says_what_it_needs(refused, small_store, indexed, extra, match):
    refused("track", small_store, *(e.format(*indexed) for e in extra), match=match)
