"""The page of a feature in a real browser."""

import pytest
from explorer import browser_page, needs_browser, served
from test_explorer_feature import HOSTILE

from gemscope.features import Explanation, Store

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture
def feature(indexed, own_store):
    """A feature that fires in several contexts, and its page's path."""
    table = Store.open(own_store).features(indexed[0], ["count"])
    number = int(table["count"].to_numpy().argsort()[-40])
    return indexed[0], number, f"/feature/{indexed[0]}/{number}"


def check_quiet(page):
    assert page.wrongs == []
    assert page.outside == []


def test_typing_shows_activations_at_once(own_store, feature):
    with served(own_store) as at, browser_page() as page:
        page.goto(at + feature[2])
        text = page.evaluate("document.querySelector('.context .text').textContent")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "try-text"
        page.keyboard.insert_text(text.replace("⏎", "\n"))
        page.wait_for_selector("#try-result .f[data-v]")
        assert "?text=" in page.url
        # The address holds it all: somebody else sees the same.
        page.goto(page.url)
        assert page.locator("#try-result .f[data-v]").count()
        check_quiet(page)


def test_keys_turn_pages_and_walk_along_contexts(own_store, feature):
    address, number, path = feature
    with served(own_store) as at, browser_page() as page:
        page.goto(at + path)
        page.keyboard.press("ArrowRight")
        page.wait_for_url(f"**/{number + 1}")
        page.keyboard.press("ArrowLeft")
        page.wait_for_url(f"**/{number}")
        page.keyboard.press("g")
        page.keyboard.type("3")
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/{address}/3")
        page.goto(at + path)
        page.locator(".context .peak").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.url.endswith(f"/{number}")
        said = "getComputedStyle(document.activeElement, '::after').content"
        assert page.evaluate(said) not in ("none", "normal")
        check_quiet(page)


def test_a_note_is_kept_and_revised(own_store, feature):
    with served(own_store) as at, browser_page() as page:
        page.goto(at + feature[2])
        page.click("#note-box summary")
        page.fill("#note-form [name=text]", "<b>it</b> counts & more")
        page.fill("#note-form [name=author]", "Ada")
        page.fill("#note-form [name=confidence]", "0.8")
        page.click("#note-form .main")
        page.wait_for_selector(".note .words")
        assert page.inner_text(".note .words") == "<b>it</b> counts & more"
        page.click("[data-revise]")
        assert page.input_value("#note-form [name=author]") == "Ada"
        page.fill("#note-form [name=text]", "it counts")
        page.click("#note-form .main")
        page.wait_for_selector("text=Earlier versions")
        check_quiet(page)
    with served(own_store) as at, browser_page() as page:
        page.goto(at + feature[2])
        assert page.locator(".note .words").all_inner_texts() == ["it counts"]


def test_a_mistake_in_a_note_is_told_there(own_store, feature):
    with served(own_store) as at, browser_page() as page:
        page.goto(at + feature[2])
        page.click("#note-box summary")
        page.fill("#note-form [name=text]", "   ")
        page.click("#note-form .main")
        page.wait_for_selector("#note-form .mistake:not([hidden])")
        assert "empty" in page.inner_text("#note-form .mistake")


def test_views_change_in_place_and_are_in_the_address(own_store, feature):
    with served(own_store) as at, browser_page() as page:
        page.goto(at + feature[2])
        page.click(".views >> text=stacked")
        page.wait_for_selector(".contexts.stacked")
        assert "view=stacked" in page.url
        page.click(".views >> text=line breaks")
        page.wait_for_url("**breaks=1**")
        page.go_back()
        page.wait_for_selector(".views [aria-checked=false]")
        check_quiet(page)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("view", ["stacked", "snippet", "full"])
def test_nothing_is_wider_than_the_page(own_store, feature, width, view):
    with served(own_store) as at, browser_page(width=width, dark=True) as page:
        page.goto(f"{at}{feature[2]}?view={view}")
        page.wait_for_selector("text=Next layer")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        check_quiet(page)


def test_hostile_text_does_nothing(own_store, feature):
    address, number, path = feature
    rows = [
        Explanation(dictionary=address, feature=number, text=t, method="model", author=t)
        for t in HOSTILE
    ]
    Store.open(own_store).add_explanations(rows)
    with served(own_store) as at, browser_page() as page:
        page.goto(at + path)
        for text in HOSTILE[:6]:
            page.evaluate("document.getElementById('note-box').open = true")
            page.fill("#note-form [name=text]", text)
            page.fill("#note-form [name=author]", text[:200])
            before = page.locator(".note").count()
            page.click("#note-form .main")
            page.locator(".note").nth(before).wait_for()
        page.fill("#try-text", "".join(HOSTILE))
        page.wait_for_selector("#try-result .box")
        page.goto(page.url)
        assert page.evaluate("window.xss") is None
        assert page.locator("main img, main iframe, main script").count() == 0
        check_quiet(page)
