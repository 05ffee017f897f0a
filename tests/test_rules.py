"""Rules that are learned: planted ones are found, chance is not, and scores are what they say."""

import dataclasses
import json

import numpy as np
import pytest
from rules import activations_of, slowly, text_of

from gemscope.corpus import read_text
from gemscope.errors import InputError
from gemscope.explain import (
    Condition,
    Conditions,
    Rule,
    RuleSettings,
    RuleText,
    draw_rule_scores,
    explain_by_rules,
    rule_summary,
)
from gemscope.explain._rule_scores import (
    Documents,
    Held,
    Prediction,
    rule_score,
    simulation_score,
    wilson,
)
from gemscope.explain._rule_split import split_documents
from gemscope.features import collect, sources_of


@pytest.fixture(scope="module")
def tokenizer(miniature):
    return miniature.tokenizer


@pytest.fixture(scope="module")
def text(tokenizer):
    """Twelve documents of Python."""
    found = [d.text for d in read_text("miniature")]
    return text_of(tokenizer, {f"{i}.py": found[i % 10][(i // 10) * 6000 :][:6000]
                               for i in range(12)}, context=256)  # fmt: skip


@pytest.fixture(scope="module")
def ready(text, tokenizer):
    return RuleText.of(text, tokenizer)


def token(tokenizer, content):
    (found,) = tokenizer(content, add_special_tokens=False)["input_ids"]
    return found


def is_token(tokenizer, *contents):
    return Condition("token", tuple(token(tokenizer, c) for c in contents), shown=contents)


def planted(tokenizer):
    """Rules, and words that the text of the one that is found must have."""
    return {
        "token": (Rule(((is_token(tokenizer, " self"),),)), ["`·self`"]),
        "after": (Rule(((Condition("word_1", ("def",)), Condition("piece", (1,))),)), ["`def`"]),
        "set": (Rule(((is_token(tokenizer, " if", " for", " in", " return"),),)), ["`·return`"]),
        "triple": (Rule(((Condition("mode", ("triple",)),),)), ["inside a triple-quoted string"]),
        "call": (
            Rule(((Condition("last", (",",)), Condition("bracket", ("call",))),)),
            ["`,`", "in a call's arguments"],
        ),
        "either": (
            Rule(((is_token(tokenizer, " ="),), (Condition("mode", ("string",)),))),
            ["`·=`", "inside a string", "; or "],
        ),
        "not": (Rule(((Condition("kind", ("word",), True),),)), ["letters"]),
    }


def activation(text, holds, generator):
    """Positive where a rule holds and the token counts."""
    values = generator.gamma(4.0, 1.0, len(holds)) * (holds & text.counts)
    return values.astype(np.float32)


def scores(made):
    return {score.name: score for score in made.scores}


def test_planted_rules_are_found_again_and_score_1(text, ready, tokenizer, tmp_path):
    generator, rules = np.random.default_rng(0), planted(tokenizer)
    holds = [rule.holds(ready.conditions) for rule, _ in rules.values()]
    columns = [activation(text, h, generator) for h in holds]
    activations = activations_of(tmp_path, text, columns)
    made = list(explain_by_rules(text, activations, "made/up", tokenizer=tokenizer, prepared=ready))
    assert [m.feature for m in made] == list(range(len(rules)))
    for found, (name, (_, words)) in zip(made, rules.items(), strict=True):
        score = scores(found)["rule"]
        assert score.value == 1.0, (name, found.text)
        assert score.detail["precision"] == score.detail["recall"] == 1.0
        assert score.low > 0.8
        assert score.high == 1.0
        # What is left is how strongly it fires: a gamma of shape 4.
        assert scores(found)["simulation"].value > 0.75
        for word in words:
            assert word in found.text, (name, found.text)
        assert (found.method, found.author) == ("rule", "gemscope rules 1")


def test_with_noise_a_planted_rule_is_found_nearly(text, ready, tokenizer, tmp_path):
    generator, rules = np.random.default_rng(1), planted(tokenizer)
    columns = []
    for rule, _ in rules.values():
        holds = rule.holds(ready.conditions)
        missed, extra = generator.random(len(holds)) < 0.1, generator.random(len(holds)) < 0.002
        columns.append(activation(text, (holds & ~missed) | extra, generator))
    activations = activations_of(tmp_path, text, columns)
    made = explain_by_rules(text, activations, "made/up", tokenizer=tokenizer, prepared=ready)
    for found, (name, (rule, _)) in zip(made, rules.items(), strict=True):
        places = ready.split.held_out_places
        wanted, fires = rule.holds(ready.conditions)[places], columns[found.feature][places] > 0
        best = 0.5 * (wanted[fires].mean() + 1 - wanted[~fires].mean())
        assert scores(found)["rule"].value > best - 0.03, (name, found.text)
        assert best > 0.65


def test_chance_is_not_explained(text, ready, tokenizer, tmp_path):
    generator = np.random.default_rng(2)
    columns = [activation(text, generator.random(len(text.ids)) < share, generator)
               for share in (0.4, 0.1, 0.03, 0.01, 0.003) for _ in range(6)]  # fmt: skip
    activations = activations_of(tmp_path, text, columns)
    made = list(explain_by_rules(text, activations, "made/up", tokenizer=tokenizer, prepared=ready))
    found = [scores(m)["rule"] for m in made]
    assert np.median([s.value for s in found] or [0.5]) == pytest.approx(0.5, abs=0.02)
    assert max(s.value for s in found) < 0.65
    assert np.mean([s.low <= 0.5 <= s.high for s in found]) >= 0.8
    # What is learned by heart is worth something where it was learned only.
    learned = [m.detail["training"]["balanced_accuracy"] for m in made]
    assert np.mean(learned) > np.mean([s.value for s in found]) + 0.01


def test_the_null_is_another_features_rule_on_the_same_places(text, ready, tokenizer, tmp_path):
    generator = np.random.default_rng(0)
    rules = [rule for rule, _ in planted(tokenizer).values()]
    columns = [activation(text, rule.holds(ready.conditions), generator) for rule in rules]
    activations = activations_of(tmp_path, text, columns)
    made = list(explain_by_rules(text, activations, "made/up", tokenizer=tokenizer, prepared=ready))
    count = [(c[ready.split.training_places] > 0).sum() for c in columns]
    order = np.argsort(count, kind="stable").tolist()
    places = ready.split.held_out_places
    for found in made:
        other = order[(order.index(found.feature) + 1) % len(order)]
        holds = Rule.from_json(made[other].detail["rule"]).holds(ready.conditions, places)
        fires = columns[found.feature][places] > 0
        null = 0.5 * (holds[fires].mean() + 1 - holds[~fires].mean())
        assert scores(found)["rule"].null == pytest.approx(null)
        assert null < 0.8


def test_silent_and_rare_features_have_no_rule_and_no_false_score(text, ready, tokenizer, tmp_path):
    generator, rule = np.random.default_rng(0), planted(tokenizer)["token"][0]
    holds = rule.holds(ready.conditions)
    training = np.zeros(len(holds), dtype=bool)
    training[ready.split.training_places] = True
    few = np.zeros(len(holds), dtype=bool)
    few[np.flatnonzero(holds & training)[:4]] = True
    columns = [np.zeros(len(holds), np.float32), activation(text, few, generator),
               activation(text, holds & training, generator),
               activation(text, holds & ~training, generator),
               text.counts.astype(np.float32)]  # fmt: skip
    activations = activations_of(tmp_path, text, columns)
    made = list(explain_by_rules(text, activations, "made/up", tokenizer=tokenizer))
    assert [m.feature for m in made] == [2]  # learned, and silent where it is to be scored
    assert made[0].scores == ()
    summary = rule_summary(made, features=5)
    assert (summary["rules"], summary["scored"], summary["without_rule"]) == (1, 0, 4)
    assert summary["median"] is summary["above"]["0.8"] is None


def test_the_same_is_learned_again_and_of_some_features_what_is_learned_of_all(
    text, ready, tokenizer, tmp_path
):
    generator = np.random.default_rng(3)
    columns = [activation(text, rule.holds(ready.conditions), generator)
               for rule, _ in planted(tokenizer).values()]  # fmt: skip
    activations = activations_of(tmp_path, text, columns)

    def learned(**more):
        found = explain_by_rules(text, activations, "made/up", tokenizer=tokenizer, **more)
        return {m.feature: dataclasses.replace(m, created="") for m in found}

    everything = learned()
    assert learned(prepared=ready) == everything
    assert learned(features=[3, 1]) == {k: everything[k] for k in (1, 3)}
    json.dumps([dict(m.detail) for m in everything.values()])
    assert learned(settings=RuleSettings(seed=1))[0].detail != everything[0].detail
    # Of a text cut short, the documents left out are not even read.
    short = RuleText.of(text, tokenizer, RuleSettings(tokens=text.n_tokens // 2))
    assert short.conditions.n_places < 0.7 * len(text.ids)
    part = np.concatenate([short.split.training_places, short.split.held_out_places])
    at = np.searchsorted(short.places, part)
    rule = planted(tokenizer)["call"][0]
    assert (rule.holds(short.conditions, at) == rule.holds(ready.conditions, part)).all()
    assert scores(learned(prepared=short)[0])["rule"].value == 1.0
    with pytest.raises(InputError, match="no feature 7: made/up has 0 to 6"):
        learned(features=[7])
    with pytest.raises(InputError, match="not the one that made/up was indexed on"):
        learned(prepared=RuleText.of(text_of(tokenizer, {"a": "b", "c": "d"}), tokenizer))


def test_documents_are_on_one_side_only(text, tokenizer):
    split = split_documents(text, held_out=0.4, tokens=10**9, seed=0)
    sides = [set(side.tolist()) for side in (split.training, split.held_out)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(12))
    for documents, places in zip(
        sides, (split.training_places, split.held_out_places), strict=True
    ):
        assert set(text.document_of(places).tolist()) == documents
        assert text.counts[places].all()
    assert len(split.training_places) + len(split.held_out_places) == text.counts.sum()
    share = len(split.held_out_places) / text.counts.sum()
    assert 0.3 < share < 0.5
    again = split_documents(text, held_out=0.4, tokens=10**9, seed=0)
    assert (again.held_out == split.held_out).all()
    others = [split_documents(text, held_out=0.4, tokens=10**9, seed=s).held_out.tolist()
              for s in range(1, 6)]  # fmt: skip
    assert any(other != split.held_out.tolist() for other in others)
    half = split_documents(text, held_out=0.4, tokens=text.n_tokens // 2, seed=0)
    used = len(half.training_places) + len(half.held_out_places)
    assert 0.35 < used / text.n_tokens < 0.65


def test_copies_stay_together_and_few_documents_are_parted(tokenizer):
    for seed in range(8):
        copies = text_of(tokenizer, {"a": "one two", "b": "three", "c": "one two", "d": "four"})
        split = split_documents(copies, held_out=0.5, tokens=100, seed=seed)
        assert len({0, 2} & set(split.training.tolist())) in (0, 2)
        two = text_of(tokenizer, {"a": "one two", "b": "three " * 50})
        split = split_documents(two, held_out=0.4, tokens=100, seed=seed)
        assert len(split.training) == len(split.held_out) == 1
    one = text_of(tokenizer, {"a": "one two three"})
    with pytest.raises(InputError, match="this text has but one; index a text of two documents"):
        split_documents(one, held_out=0.4, tokens=100, seed=0)
    with pytest.raises(InputError, match=r"0\.0 of the tokens cannot be held out"):
        split_documents(two, held_out=0.0, tokens=100, seed=0)


def test_scores_are_what_their_names_say():
    generator = np.random.default_rng(0)
    document = np.sort(generator.integers(0, 7, 3000))
    documents = Documents(np.unique(document, return_inverse=True)[1])
    which = generator.integers(-1, 2, 3000).astype(np.int8)
    fires = np.flatnonzero(generator.random(3000) < np.where(which >= 0, 0.3, 0.05))
    values = generator.gamma(2.0, 1.0, len(fires)).astype(np.float32)
    own, held = Prediction(which, np.array([1.0, 2.5])), Held(fires, values)
    null = Prediction(np.roll(which, 700), np.array([0.5, 0.5]))
    real = np.zeros(3000)
    real[fires] = values

    def balanced(rule):
        said, on = rule.which >= 0, real > 0
        return sum([(said & on).sum() / on.sum(), (~said & ~on).sum() / (~on).sum()]) / 2

    score = rule_score(documents, held, own, null)
    assert score.value == pytest.approx(balanced(own))
    assert score.null == pytest.approx(balanced(null))
    assert score.detail["precision"] == pytest.approx((real[which >= 0] > 0).mean())
    assert score.detail["recall"] == pytest.approx((which[fires] >= 0).mean())
    assert score.low < score.value < score.high
    assert score.n == 3000
    score = simulation_score(documents, held, own, null)
    levels = {-1: 0.0, 0: 1.0, 1: 2.5}
    told = np.array([levels[w] for w in which.tolist()])
    assert score.value == pytest.approx(np.corrcoef(real, told)[0, 1])
    assert score.null == pytest.approx(np.corrcoef(real, null.which >= 0)[0, 1])
    assert score.low < score.value < score.high
    silent = Prediction(np.full(3000, -1, np.int8), np.array([1.0]))
    assert simulation_score(documents, held, silent, None).value == 0
    assert rule_score(documents, held, silent, None).value == 0.5
    one = Held(fires[document[fires] == 0], values[document[fires] == 0])
    alone = rule_score(documents, one, own, None)
    assert (alone.low, alone.high) == (0.0, 1.0)  # of one document nothing follows


@pytest.mark.parametrize(("count", "spread"), [(4, 3.0), (12, 3.0), (40, 8.0)])
def test_the_interval_covers_what_other_documents_would_give(count, spread):
    generator, covered = np.random.default_rng(count), 0
    recall, alarm = 0.7, 0.05
    for _ in range(300):
        tables = []
        for number in range(count):
            size, share = int(generator.integers(200, 800)), generator.beta(3, 40)
            fires = generator.random(size) < share
            own = generator.beta(recall * spread, (1 - recall) * spread)
            wrong = generator.beta(alarm * 20, (1 - alarm) * 20)
            said = generator.random(size) < np.where(fires, own, wrong)
            tables.append((np.full(size, number), fires, said))
        document, fires, said = (np.concatenate(column) for column in zip(*tables, strict=True))
        which = np.where(said, 0, -1).astype(np.int8)
        held = Held(np.flatnonzero(fires), np.ones(int(fires.sum()), np.float32))
        score = rule_score(Documents(document), held, Prediction(which, np.ones(1)), None)
        covered += score.low <= 0.5 * (recall + 1 - alarm) <= score.high
    assert covered / 300 >= 0.9


def test_wilson_by_hand():
    assert wilson(0.0, 10.0) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8.0, 10.0) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_a_stored_rule_holds_on_other_text_where_it_should(tokenizer):
    shown = ("x", "(", ",")
    rule = Rule((
        (Condition("token", tuple(token(tokenizer, s) for s in shown), shown=shown),
         Condition("repeats", (0,), True)),
        (Condition("text", ("def", "中", "return")), Condition("position", (1, 2, 3), True)),
        (Condition("followed", (token(tokenizer, ","),), False, (",",)),),
    ))  # fmt: skip
    again = Rule.from_json(json.loads(json.dumps(rule.json())))
    assert again == rule
    other = text_of(
        tokenizer, {"p": "def f(x, x): return (x, x)\n" * 3, "q": "中文 <b>x</b> 😀, ("}
    )
    found = Conditions.of(other, tokenizer)
    holds = again.holds(found)
    assert (holds == slowly(rule, other, tokenizer)).all()
    assert holds.any()
    places = np.array([3, 7, 11, 30])
    assert (again.holds(found, places) == holds[places]).all()
    assert (again.holds(found.at(places)) == holds[places]).all()


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        (None, "not a rule of version 1"),
        ({"version": 99, "terms": []}, "not a rule of version 1"),
        ({"version": 1, "terms": []}, "1 to 64 terms"),
        ({"version": 1, "terms": [[]]}, "1 to 64 conditions"),
        (
            {"version": 1, "terms": [[{"channel": "next", "values": [1]}]]},
            "no known channel: 'next'",
        ),
        ({"version": 1, "terms": [[7]]}, "no known channel: '7'"),
        ({"version": 1, "terms": [[{"channel": "kind", "values": []}]]}, "1 to 64 values"),
        ({"version": 1, "terms": [[{"channel": "kind", "values": [[]]}]]}, "cannot have"),
        ({"version": 1, "terms": [[{"channel": "kind", "values": [True]}]]}, "cannot have"),
        ({"version": 1, "terms": [[{"channel": "token", "values": [1]}]]}, "cannot have"),
        ({"version": 1, "terms": [[{"channel": "place", "values": ["x"]}]]}, "cannot have"),
        ({"version": 1, "terms": [[{"channel": "place", "values": [10**9]}]]}, "cannot have"),
        ({"version": 1, "terms": [[{"channel": "kind", "values": ["a"] * 65}]]}, "1 to 64 values"),
    ],
)
def test_a_rule_from_elsewhere_is_checked(stored, match):
    with pytest.raises(InputError, match=match):
        Rule.from_json(stored)


@pytest.mark.parametrize(
    ("terms", "wanted"),
    [
        ([[("token", (":",), False), ("word_1", ("except", "else"), False)]],
         "`:` after the word `except` or `else`"),
        ([[("mode", ("triple",), False)]], "inside a triple-quoted string"),
        ([[("last", ("=",), False), ("bracket", ("call",), False)]],
         "a token ending with `=`, in a call's arguments"),
        ([[("token", ("\n       ", " ˋ", "\t"), True)]], "any token but `⏎·×7`, `·ˋ` or `⇥`"),
        ([[("place", (0,), False)]], "first in its line"),
        ([[("so_far", ("if", "elif"), False), ("mode", ("code",), False)]],
         "where the word so far is `if` or `elif`, outside strings and comments"),
        ([[("position", (1, 2, 3, 4), False)]], "at token 1 to 7 of the context"),
        ([[("depth", (0, 4), False)]], "inside 0 or 4 or more brackets"),
        ([[("text", ("", "a"), False)], [("before", (".", "line"), False)]],
         "`a` (any spacing) or white space; or right after `.` or first in its line"),
        ([[("kind", ("word",), False), ("callee", ("isinstance",), False)]],
         "letters in the arguments of `isinstance`"),
    ],
)  # fmt: skip
def test_rules_are_told_in_words(terms, wanted):
    rule = Rule(tuple(
        tuple(Condition(name, tuple(range(len(values))) if name == "token" else values, negated,
                        values if name == "token" else ())
              for name, values, negated in term)
        for term in terms
    ))  # fmt: skip
    assert rule.text == wanted


def test_rules_of_the_miniature_tell_when_real_features_fire(miniature, tmp_path):
    from gemscope.hub import load_sae

    address = "miniature/transcoder_all/layer_0_width_192_l0_small"
    activations = collect(
        miniature, [load_sae(address)], sources_of(tokens=10_000), tmp_path / "a",
        tokens=10_000, addresses=[address],
    )  # fmt: skip
    made = list(explain_by_rules(
        activations.text, activations, address, tokenizer=miniature.tokenizer, features=range(48)
    ))  # fmt: skip
    summary = rule_summary(made, features=48)
    assert summary["median"] > 0.7
    assert summary["above"]["0.8"] > 0.2
    assert summary["median_null"] == pytest.approx(0.5, abs=0.06)
    assert summary["above_null"]["0.8"] < 0.1
    values = np.array([scores(m)["rule"].value for m in made if m.scores])
    assert summary["above"]["0.9"] == pytest.approx((values > 0.9).mean())
    assert summary["of_all_above"]["0.8"] == pytest.approx((values > 0.8).sum() / 48)
    for name in ("scores.svg", "scores.png"):
        draw_rule_scores({address: made, **{f"other/{i}": made for i in range(9)}}, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5_000
    drawn = (tmp_path / "scores.svg").read_text()
    # Text is drawn as outlines, with what it says in a comment.
    for said in ("at least that", "another feature's rule: ", "balanced accuracy on held-out",
                 f"miniature/transcoder_all: {summary['above']['0.8']:.0%}"):  # fmt: skip
        assert f"<!-- {said}" in drawn or said in drawn
    with pytest.raises(InputError, match=r"written as \.svg, \.png or \.pdf"):
        draw_rule_scores({address: made}, tmp_path / "scores.txt")
    with pytest.raises(InputError, match="no rule with a score to draw"):
        draw_rule_scores({address: []}, tmp_path / "scores.svg")
