"""Searching, maps and comparisons in a real browser."""

import re

import pytest
from explorer import browser_page, needs_browser, served

pytestmark = [pytest.mark.slow, needs_browser]


def feature(url):
    """What a feature's address ends with."""
    return re.search(r"/feature/(.+)$", url)[1]


def test_results_come_while_one_types_and_the_keyboard_goes_through_them(small_store):
    with served(small_store) as address, browser_page() as page:
        page.goto(f"{address}/search")
        page.locator("h1").click()
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "q"
        page.keyboard.type("return", delay=20)
        page.wait_for_selector("a.hit")
        page.wait_for_url("**q=return&**")
        hits = [a.get_attribute("href") for a in page.locator("a.hit").all()]
        assert len(hits) == 20
        for key, place in (("ArrowDown", 0), ("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1)):
            page.keyboard.press(key)
            assert page.evaluate("document.activeElement.getAttribute('href')") == hits[place]
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowUp")
        assert page.evaluate("document.activeElement.id") == "q"
        page.keyboard.press("ArrowDown")
        assert page.wrongs == []
        page.keyboard.press("Enter")
        page.wait_for_url("**/feature/**")
        assert feature(page.url) == feature(hits[0])
        assert page.outside == []


def test_a_condition_and_its_mistake_stand_in_place(small_store):
    with served(small_store) as address, browser_page() as page:
        page.goto(f"{address}/search?q=return")
        page.fill("#where", "nonsense > 1")
        page.wait_for_selector("#results [role=alert]")
        assert "no statistic named nonsense" in page.inner_text("#results")
        page.fill("#where", "density < 0.01")
        page.wait_for_selector("#results a.hit")
        page.check("input[value=promotes]")
        page.locator("#results", has_text="in s.d.").wait_for()
        assert "kind=promotes" in page.url
        assert "where=" in page.url
        # The address is the whole state: opened again it shows the same.
        said = page.inner_text("#results")
        page.reload()
        assert page.inner_text("#results") == said
        assert page.is_checked("input[value=promotes]")


def test_search_works_without_scripts(small_store):
    with served(small_store) as address, browser_page() as page:
        page.route("**/*.js", lambda route: route.abort())
        page.goto(f"{address}/search")
        page.fill("#q", "return")
        page.press("#q", "Enter")
        page.wait_for_url("**q=return**")
        assert page.locator("a.hit").count() == 20
