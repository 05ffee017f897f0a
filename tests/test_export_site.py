"""Features as plain files: complete, linked, closed to the outside, and hostile text harmless."""

import json

import pytest
from test_explorer_feature import HOSTILE, Tags, check_harmless, poisoned

from gemscope.errors import InputError
from gemscope.explorer import best_of, export_site, labelled
from gemscope.features import Explanation, Note, Store


@pytest.fixture(scope="module")
def store(small_store):
    return Store.open(small_store)


@pytest.fixture(scope="module")
def some(store, indexed):
    return [*best_of(store, indexed[0], 4), (indexed[1], 7)]


def pages_of(folder):
    return sorted((folder / "features").iterdir())


def test_all_is_there_and_every_link_leads_somewhere(store, some, tmp_path):
    made = export_site(store, some, tmp_path / "site")
    assert made.pages == 5
    assert made.index == tmp_path / "site" / "index.html"
    assert len(pages_of(made.folder)) == 5
    for file in (made.index, *pages_of(made.folder)):
        page = file.read_text("utf-8")
        check_harmless(page)
        for _, attributes in Tags(page).found:
            for name in ("href", "src"):
                to = attributes.get(name)
                if to and not to.startswith("data:"):
                    assert not to.startswith("/")
                    assert (file.parent / to).resolve().is_relative_to(made.folder.resolve())
                    assert (file.parent / to).is_file(), to
    assert "url(" not in (made.folder / "style.css").read_text()


def test_pages_say_what_the_record_says(store, some, tmp_path):
    address, feature = some[0]
    export_site(store, some[:1], tmp_path / "site")
    (page,) = pages_of(tmp_path / "site")
    found = page.read_text("utf-8")
    assert f"Feature {feature} of {address}" in found
    assert f"{store.feature(address, feature)['count']:,} of" in found


def test_which_features(own_store, indexed):
    store = Store.open(own_store)
    for feature, score in ((3, 0.9), (5, 0.7), (9, None)):
        rows = [] if score is None else [{"name": "rule", "value": score, "low": 0.1, "high": 1.0}]
        from gemscope.features import Score

        scores = tuple(Score(**row) for row in rows)
        store.add_explanations(
            [Explanation(dictionary=indexed[0], feature=feature, text="x", method="model",
                         author="a", scores=scores)]
        )  # fmt: skip
    store.add_notes([Note(dictionary=indexed[1], feature=2, text="y")])
    known = [(indexed[0], 3), (indexed[0], 5), (indexed[0], 9), (indexed[1], 2)]
    assert [key for key in labelled(store) if key in known] == known
    alive = store.figures()[indexed[0]][:, 1] > 0
    want = [(indexed[0], f) for f in (3, 5) if alive[f]]
    assert best_of(store, indexed[0], 400)[: len(want)] == want


def test_mistakes(store, some, tmp_path, indexed):
    for features, said in (([], "no feature"), ([("no/such", 1)], "not indexed"),
                           ([(indexed[0], 10**9)], "no feature")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            export_site(store, features, tmp_path / "site")
    with pytest.raises(InputError, match="1 or more"):
        best_of(store, indexed[0], 0)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        export_site(store, some, tmp_path / "mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="--force"):
        export_site(store, some, tmp_path / "full")
    assert not (tmp_path / "site").exists()


def test_force_takes_away_its_own_pages_only(store, some, tmp_path):
    site = tmp_path / "site"
    export_site(store, some, site)
    (site / "features" / "mine.html").write_text("mine")
    (tmp_path / "victim.html").write_text("mine")
    known = json.loads((site / "site.json").read_text())
    known["pages"] += ["../../victim.html", 5, None, "/etc/hostname"]
    (site / "site.json").write_text(json.dumps(known))
    export_site(store, some[:2], site, force=True)
    assert len(pages_of(site)) == 3
    assert (site / "features" / "mine.html").read_text() == "mine"
    assert (tmp_path / "victim.html").exists()


def test_two_addresses_never_share_a_page():
    from gemscope.explorer._export_site import _names

    names = _names([("a/b", 1), ("a-b", 1), ("A/b", 1), ("../..", 2), ("a?b#c", 1), ("/", 0)])
    assert len({n.lower() for n in names.values()}) == 6
    for name in names.values():
        assert not set(name) & set("/\\?#%: ")
        assert not name.startswith(".")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text(store, some, tmp_path, text, monkeypatch):
    from gemscope.explorer import _export_site

    kept = _export_site.record
    monkeypatch.setattr(_export_site, "record", lambda *given: poisoned(kept(*given), text))
    made = export_site(store, some[:1], tmp_path / "site")
    for file in (made.index, *pages_of(made.folder)):
        check_harmless(file.read_text("utf-8"))


def test_the_command(small_store, some, tmp_path, capsys):
    from gemscope.cli import main

    names = [f"{a}/{f}" for a, f in some]
    to = ["--to", str(tmp_path / "site")]
    assert main(["export-site", str(small_store), "--features", *names[:3], *to, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pages"] == 3
    assert main(["export-site", str(small_store), "--top", "2", some[0][0], *to]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export-site", str(small_store), "--top", "2", some[0][0], *to, "--force"]) == 0
    assert len(pages_of(tmp_path / "site")) == 2
    assert main(["export-site", str(small_store), "--features", names[0]]) == 2
    assert main(["export-site", str(small_store), *to]) == 2


@pytest.mark.slow
def test_it_opens_from_a_disk(store, some, tmp_path):
    from explorer import CHROMIUM
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed")
    made = export_site(store, some, tmp_path / "a site")
    wrongs, asked = [], []
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda error: wrongs.append(str(error)))
        page.on("console", lambda m: wrongs.append(m.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(made.index.as_uri())
        page.fill("#find", "no such words anywhere")
        assert page.inner_text("#shown") == "0 / 5"
        page.fill("#find", str(some[-1][1]))
        assert page.locator("tbody tr:visible").count() >= 1
        page.locator("tbody tr:visible a").last.click()
        assert "Feature" in page.inner_text("h1")
        browser.close()
    assert wrongs == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
