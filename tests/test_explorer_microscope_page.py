"""The start page in a browser: typing, choosing tokens, keys, sorting, layers, a phone."""

import pytest
from explorer import browser_page, needs_browser, served

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def site(small_store):
    with served(small_store) as address:
        yield address


def settled(page):
    page.wait_for_selector("#panel table, #panel p")
    page.wait_for_selector("body:not(:has(.htmx-request))")


def test_reading_a_text(site, indexed):
    with browser_page() as page:
        page.goto(site)
        settled(page)  # an example is read without being asked for
        page.keyboard.press("/")
        page.keyboard.press("Control+a")
        page.keyboard.type("import os\nx = os.path\n")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("label.tok:has-text('path')")
        assert "text=import" in page.url
        page.select_option("select[name=dense]", "1.0")
        page.wait_for_url("**dense=1.0**")
        settled(page)
        page.locator("label.tok", has_text="os").first.click()
        page.wait_for_selector("#panel h2:has-text('Token 2')")
        assert "token=2" in page.url
        first = page.locator("table.features tbody tr").first.inner_text()
        # The radios of the tokens have the arrows of any group, and so has the page.
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#panel h2:has-text('Token 3')")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#panel h2:has-text('Token 2')")
        assert page.locator("table.features tbody tr").first.inner_text() == first
        # The address restores all of it.
        page.goto(page.url)
        assert page.locator("#t2").is_checked()
        assert page.locator("table.features tbody tr").first.inner_text() == first
        assert (page.wrongs, page.outside) == ([], [])


def test_colouring_sorting_and_layers(site, indexed):
    with browser_page() as page:
        page.goto(f"{site}/?text=def f(a):%0A    return a&dense=1")
        settled(page)
        page.locator("button.quiet").first.click()
        page.wait_for_selector(".legend button")
        assert "feature=" in page.url
        page.click(".legend button")
        page.wait_for_selector(".legend button", state="detached")
        assert "feature=" not in page.url
        page.select_option("select[name=sort]", "density")
        page.wait_for_url("**sort=density**")
        settled(page)
        densities = page.locator("table.features tbody td:nth-child(4)").all_inner_texts()
        shares = [float(d.split("%")[0]) for d in densities]
        assert shares == sorted(shares)
        page.click("summary")
        page.click("a[data-choose]")
        page.wait_for_url("**layer_2**layer_3**")
        settled(page)
        page.locator("label.tok").nth(3).click()
        page.wait_for_selector("table.ladder")
        assert page.locator("table.ladder tbody th").all_inner_texts() == [
            "2.resid_post", "3.resid_post",
        ]  # fmt: skip
        # A new text has no lock.
        page.click("a[data-example] >> nth=1")
        page.wait_for_selector("label.tok:has-text('Read')")
        assert "token=" not in page.url
        page.go_back()
        page.wait_for_selector("table.ladder")
        assert (page.wrongs, page.outside) == ([], [])


def test_mistakes_are_told_in_place(site):
    with browser_page() as page:
        page.goto(site)
        settled(page)
        page.fill("#text", "<eos>")
        page.click("button.main")
        page.wait_for_selector("#reading .mistake")
        assert "special tokens" in page.inner_text("#reading .mistake")
        page.fill("#text", "x = 1")
        page.click("button.main")
        settled(page)
        assert page.locator(".mistake").count() == 0
        assert page.outside == []


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone(site, dark):
    with browser_page(width=390, height=800, dark=dark) as page:
        page.goto(f"{site}/?text=def f(a):%0A    return a&dense=1&token=2")
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("table.features .said").first.is_visible()
        assert (page.wrongs, page.outside) == ([], [])
