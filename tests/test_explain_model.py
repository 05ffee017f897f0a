"""Labels and scores by a model that is known: perfect, or one that always says yes."""

import json

import numpy as np
import pytest
from chat_oracle import Oracle

from gemscope.errors import InputError
from gemscope.explain import (
    Asker,
    ModelJudge,
    ModelSettings,
    Replies,
    Reply,
    choose,
    estimate_work,
    label_features,
    run_model,
    run_rules,
    score_explanations,
)
from gemscope.explain._firings import Firings, Sides
from gemscope.explain._scores import questions
from gemscope.features import Explanation, Note, Store

FEATURES = (3, 4, 8, 16, 23, 24, 25, 30, 33, 35)
SCORES = ("detection", "fuzzing", "contrast")


class Chat:
    """A model in the test's own process; whatever it is given to answer with."""

    model, at, concurrency = "some-model", "nowhere", 4

    def __init__(self, answer):
        self.say, self.asked = answer, []

    def answer(self, request):
        self.asked.append(request)
        return Reply(self.say(request.messages), "stop", 10, 5)

    def halt(self):
        pass


@pytest.fixture(scope="session")
def oracle(small_store, indexed):
    return Oracle(small_store, indexed[0], FEATURES)


@pytest.fixture
def store(own_store):
    return Store.open(own_store)


@pytest.fixture
def ask(tmp_path):
    def make(answer):
        chat = Chat(answer)
        return Asker(chat, Replies(tmp_path / "replies", chat.at, chat.model))

    return make


def run(store, indexed, asker, settings, features=FEATURES):
    works = choose(store, [indexed[0]], features)
    (outcome,) = run_model(store, works, asker, settings)
    return outcome


def test_a_perfect_judge_scores_one_and_another_features_label_a_half(store, indexed, oracle, ask):
    settings = ModelSettings(scores=SCORES, judged=30)
    outcome = run(store, indexed, ask(oracle), settings)
    assert [e.text for e in outcome.explanations] == [f"feature number {f}" for f in FEATURES]
    kept = store.explanations(indexed[0])
    assert [(e.feature, e.scores) for e in kept] == [
        (e.feature, e.scores) for e in outcome.explanations
    ]
    nulls = {name: [] for name in SCORES}
    for explanation in kept:
        assert explanation.method, explanation.author == ("model", "some-model")
        assert [s.name for s in explanation.scores] == [*SCORES]
        for score in explanation.scores:
            assert (score.value, score.failures) == (1.0, 0)
            assert 0.5 < score.low < 1.0
            assert score.detail["null_feature"] != explanation.feature
            nulls[score.name].append(score.null)
    for name, values in nulls.items():
        # Features of one dictionary are not independent, so about; ten of them, sixty windows each.
        assert abs(np.mean(values) - 0.5) < 0.12, (name, values)


def test_who_always_says_yes_scores_a_half(store, indexed, ask):
    def yes(messages):
        asked = messages[1][1].rsplit("The list of ", 1)
        return json.dumps([1] * int(asked[1].split()[0])) if len(asked) > 1 else "Label: words"

    outcome = run(store, indexed, ask(yes), ModelSettings(scores=SCORES, null=False))
    values = [s.value for e in outcome.explanations for s in e.scores]
    assert len(values) == 3 * len(FEATURES)
    assert set(values) == {0.5}
    assert {s.null for e in outcome.explanations for s in e.scores} == {None}


def test_unreadable_verdicts_are_wrong_and_counted(store, indexed, oracle, ask):
    def mumbling(messages):
        answer = oracle(messages)
        # One prompt in two is answered with a list that is one short.
        odd = answer.startswith("[") and sum(map(ord, messages[1][1])) % 2
        return json.dumps(json.loads(answer)[:-1]) if odd else answer

    settings = ModelSettings(scores=("detection",), null=False, per_prompt=5)
    outcome = run(store, indexed, ask(mumbling), settings)
    failures = 0
    for explanation in outcome.explanations:
        (score,) = explanation.scores
        failures += score.failures
        assert score.failures % 5 == 0
        wrong = (1 - score.detail["recall"]) * score.detail["yes"]
        wrong += (1 - score.detail["specificity"]) * (score.n - score.detail["yes"])
        assert round(wrong) == score.failures
    assert failures > 0


def test_labels_are_asked_for_again_with_what_was_wrong(store, indexed, oracle, ask):
    def first_aloud(messages):
        if "The list of" in messages[1][1]:
            return oracle(messages)
        if len(messages) == 2:
            return "Method 1: list the tokens\nThey are ..."
        assert messages[2] == ("assistant", "Method 1: list the tokens\nThey are ...")
        assert "it has more than one line" in messages[3][1]
        return oracle(messages)

    asker = ask(first_aloud)
    outcome = run(store, indexed, asker, ModelSettings(scores=()))
    assert [e.text for e in outcome.explanations] == [f"feature number {f}" for f in FEATURES]
    assert outcome.explanations[0].detail["raw"] == [
        "Method 1: list the tokens\nThey are ...", f"Label: feature number {FEATURES[0]}",
    ]  # fmt: skip
    assert len(asker.chat.asked) == 2 * len(FEATURES)


def test_features_without_a_usable_label_are_told_and_the_rest_goes_on(store, indexed, oracle, ask):
    def stubborn(messages):
        label = oracle(messages[:2])
        return (
            "Let's see"
            if label in ("Label: feature number 8", "Label: feature number 30")
            else label
        )

    outcome = run(store, indexed, ask(stubborn), ModelSettings(scores=()))
    assert outcome.labelled.unusable == dict.fromkeys((8, 30), "it thinks aloud instead of naming")
    assert {e.feature for e in store.explanations(indexed[0])} == {*FEATURES} - {8, 30}
    assert "2 without a usable answer" in "\n".join(outcome.lines())


def test_nonsense_alone_is_an_error_and_everything_is_kept(store, indexed, ask):
    asker = ask(lambda _: "Let me think about it.\nWell")
    with pytest.raises(InputError, match="no usable label for any of 10 feature") as told:
        run(store, indexed, asker, ModelSettings())
    assert str(asker.replies.file) in str(told.value)
    assert len(asker.replies) == 2 * len(FEATURES), "asked again once: it repeats itself"
    assert store.explanations(indexed[0]) == []


def test_no_window_of_a_score_is_of_a_document_that_was_explained_from(store, indexed, oracle, ask):
    settings = ModelSettings(scores=SCORES)
    outcome = run(store, indexed, ask(oracle), settings)
    for explanation in outcome.explanations:
        explained = set(explanation.detail["documents"]["explaining"])
        assert explained
        for score in explanation.scores:
            assert score.detail["documents"]
            assert not explained & set(score.detail["documents"])
    # Nor when it is scored with a seed by which they would be.
    again = score_explanations(
        store, indexed[0], outcome.explanations,
        ModelJudge(ask(oracle)), ModelSettings(scores=SCORES, seed=5),
    )  # fmt: skip
    for explanation in again.explanations:
        explained = set(explanation.detail["documents"]["explaining"])
        for score in explanation.scores:
            assert not explained & set(score.detail["documents"])


def test_windows_are_what_they_are_said_to_be(store, indexed):
    settings = ModelSettings(scores=SCORES)
    sampler = settings.sampler(store, indexed[0])
    text, activations = store.text(indexed[0]), store.activations(indexed[0])
    for feature in FEATURES:
        places, _ = activations.of(indexed[0], feature)
        fires = np.zeros(len(text.ids), dtype=bool)
        fires[places] = True
        made = Explanation(
            dictionary=indexed[0], feature=feature, text="a", method="imported", author="b"
        )
        found, _ = questions(sampler, made, SCORES, 20)
        near = {n["feature"] for n in store.feature(indexed[0], feature)["neighbours"]}
        theirs = {int(p) for n in near for p in activations.of(indexed[0], n)[0]}
        own_tokens = set(text.ids[places].tolist())
        for asked in found:
            spans = [(w.first, w.stop) for w in asked.yes + asked.no]
            assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False))
            for window in asked.yes + asked.no:
                assert len(set(text.context[window.places].tolist())) == 1
                assert (np.array(window.values) > 0).tolist() == fires[window.places].tolist()
            assert all(any(w.values) for w in asked.yes)
            if asked.name == "fuzzing":
                assert sorted(sum(w.marks) for w in asked.no)
                assert all(sum(w.marks) == sum(w.marked().marks) for w in asked.yes + asked.no)
            else:
                assert not any(any(w.values) or w.marks for w in asked.no)
        hard = next(q for q in found if q.name == "contrast")
        for window in hard.no[: hard.kinds["a neighbour fires"]]:
            assert theirs & set(window.places.tolist())
        for window in hard.no[hard.kinds["a neighbour fires"] :][: hard.kinds["same token"]]:
            assert own_tokens & set(text.ids[window.places].tolist())


def test_sides_are_halves_of_the_documents_a_feature_fires_in(store, indexed):
    firings = Firings(store, indexed[0])
    sides, other = Sides(firings.text, 0), Sides(firings.text, 1)
    differs = 0
    for feature in FEATURES:
        firing = firings.of(feature)
        documents = np.unique(firings.text.document_of(firing.places))
        explaining = sides.explaining(firing)
        assert abs(2 * explaining[documents].sum() - len(documents)) <= 1
        assert (explaining == Sides(firings.text, 0).explaining(firing)).all()
        differs += (explaining != other.explaining(firing)).any()
    assert differs > len(FEATURES) / 2


def test_without_kept_activations_the_contexts_serve(store, indexed, oracle, ask):
    import shutil

    shutil.rmtree(store.folder / "activations")
    outcome = run(store, indexed, ask(oracle), ModelSettings(scores=("detection", "fuzzing")))
    assert len(outcome.explanations) == len(FEATURES)
    scores = [s for e in outcome.explanations for s in e.scores]
    assert len(scores) > len(FEATURES)
    assert {s.value for s in scores} == {1.0}
    assert any("elsewhere in its contexts" in s.detail["no"] for s in scores)


def test_imported_labels_are_scored_and_keep_what_else_is_known(store, indexed, oracle, ask):
    rows = [
        Explanation(dictionary=indexed[0], feature=f, text=f"feature number {g}", method="imported",
                    author="them", detail={"id": f}, created="2020-01-01T00:00:00+00:00")
        for f, g in ((4, 4), (8, 30), (16, 16))
    ]  # fmt: skip
    store.add_explanations(rows)
    works = choose(store, None, None, scoring=True, of="them")
    outcomes = run_model(store, works, ask(oracle), ModelSettings(scores=("detection",)))
    kept = store.explanations(indexed[0])
    assert [(e.text, e.detail, e.created) for e in kept] == [
        (e.text, e.detail, e.created) for e in rows
    ]
    right, wrong, also = (e.scores[0] for e in kept)
    assert (right.value, also.value) == (1.0, 1.0)
    assert wrong.value < 0.8
    assert sum(len(o.explanations) for o in outcomes) == 3
    with pytest.raises(InputError, match="no explanations by nobody of these features to score"):
        choose(store, None, None, scoring=True, of="nobody")


def test_notes_are_left_alone(store, indexed, oracle, ask):
    note = Note(dictionary=indexed[0], feature=8, text="mine", author="me")
    store.add_notes([note])
    (work,) = choose(store, [indexed[0]], FEATURES)
    assert (work.noted, 8 in work.features) == ([8], False)
    (work,) = choose(store, [indexed[0]], FEATURES, noted=True)
    label_features(store, indexed[0], work.features, ask(oracle), ModelSettings(scores=()))
    assert store.notes(indexed[0]) == [note]
    assert 8 in {e.feature for e in store.explanations(indexed[0])}


def test_the_estimate_is_what_is_asked_then(store, indexed, oracle, ask):
    asker, settings = ask(oracle), ModelSettings(scores=("detection", "fuzzing"))
    works = choose(store, [indexed[0]], FEATURES)
    before = estimate_work(store, works, asker, settings)
    assert asker.chat.asked == []
    run_model(store, works, asker, settings)
    assert before.requests == len(asker.chat.asked) == asker.counts.asked
    size = sum(len(c.encode()) for r in asker.chat.asked for _, c in r.messages) / 3.5
    # The label's length is guessed.
    assert before.tokens_in == pytest.approx(size, rel=0.02)
    assert before.price(1e6, 0.0) == before.tokens_in
    after = estimate_work(store, works, asker, settings)
    assert (after.requests, after.tokens_in) == (0, 0)
    assert after.kept == before.requests


def test_rules_judge_themselves_on_documents_they_were_not_learned_on(store, indexed):
    works = choose(store, [indexed[0]], (4, 8, 23, 25))
    (outcome,) = run_rules(store, works, ModelSettings(scores=SCORES))
    paths = store.text(indexed[0]).paths
    kept = {e.feature: e for e in store.explanations(indexed[0])}
    assert kept.keys() == {4, 8, 23, 25}
    for explanation in outcome.explanations:
        assert kept[explanation.feature].scores == explanation.scores
        learned = set()
        for part in explanation.detail["training"]["documents"].split(","):
            first, _, last = part.partition("-")
            learned |= {paths[d] for d in range(int(first), int(last or first) + 1)}
        names = [s.name for s in explanation.scores]
        assert names == ["rule", "simulation", *SCORES]
        for score in explanation.scores[2:]:
            assert not learned & set(score.detail["documents"])
    # "A token ending with a colon" is as good as known of feature 23.
    assert kept[23].scores[2].value > 0.9
    strangers = choose(store, [indexed[0]], [5])
    assert run_rules(store, strangers, ModelSettings(scores=()))[0].explanations


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"examples": 1}, "examples is 1; take 2 to 200"),
        ({"per_prompt": 0}, "per-prompt is 0; take 1 to 50"),
        ({"seed": -1}, "seed is -1"),
        ({"scores": ("detecton",)}, "no score 'detecton'; nearest: detection"),
    ],
)
def test_settings_that_cannot_be(options, match):
    with pytest.raises(InputError, match=match):
        ModelSettings(**options)
