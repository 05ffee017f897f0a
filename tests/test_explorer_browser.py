"""Every page in a real browser: by eye, hand and keyboard, light and dark, large and small."""

import shutil

import pytest
from explorer import browser_page, needs_browser, pages_of, served

from gemscope.features import Explanation, Note, Store

pytestmark = [pytest.mark.slow, needs_browser]
PAGES = ("microscope", "feature", "search", "map", "compare", "steer", "graphs", "scope", "first")
_ATTACK = '"><img src=x onerror="window.hit=1"><script>window.hit=1</script>'


@pytest.fixture(scope="module")
def address(small_store, indexed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "store"
    shutil.copytree(small_store, folder)
    store = Store.open(folder)
    at = {"dictionary": indexed[0], "feature": 3, "text": _ATTACK}
    store.add_notes([Note(**at)])
    store.add_explanations([Explanation(**at, method="model", author=_ATTACK)])
    with served(folder) as found:
        yield found


def settled(page, url):
    page.goto(url, wait_until="networkidle", timeout=120_000)
    page.wait_for_timeout(300)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_for_everybody(address, indexed, name, dark):
    """No outside request, no error, and axe-core has no serious or critical finding."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    with browser_page(dark=dark) as page:
        settled(page, address + pages_of(indexed)[name])
        assert page.evaluate("window.hit") is None
        assert (page.outside, page.wrongs) == ([], [])
        found = axe.Axe().run(page).response["violations"]
        told = [
            (v["id"], v["impact"], [n["html"][:160] for n in v["nodes"]][:3])
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
        assert not told, told


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_telephone(address, indexed, name):
    with browser_page(width=390, height=800) as page:
        settled(page, address + pages_of(indexed)[name])
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert (page.outside, page.wrongs) == ([], [])


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_in_chinese(address, indexed, name):
    with browser_page(language="zh-CN") as page:
        settled(page, address + pages_of(indexed)[name])
        assert page.locator("html").get_attribute("lang") == "zh-Hans"
        assert page.locator("nav").get_by_text("显微镜").count() == 1
        assert page.wrongs == []


@pytest.mark.parametrize("name", PAGES)
def test_what_is_stored_does_not_run(address, indexed, name):
    with browser_page() as page:
        settled(page, address + pages_of(indexed)[name].replace("=def", "=%3Cscript%3Ehit=1"))
        assert page.evaluate("window.hit") is None
        assert page.locator("img[src=x]").count() == 0


def test_the_keyboard_is_enough(address):
    with browser_page() as page:
        settled(page, f"{address}/scope")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("?")
        assert page.locator("#keys").evaluate("d => d.open")
        page.keyboard.press("Escape")
        assert not page.locator("#keys").evaluate("d => d.open")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.name") == "release"
        first = page.locator(".grid").nth(1).locator("a").first
        first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        where = page.evaluate("[document.activeElement.closest('td').cellIndex, "
                              "document.activeElement.closest('tr').rowIndex]")  # fmt: skip
        assert where == [3, 2]
        assert page.evaluate("document.activeElement.title") in page.locator("#told").inner_text()


def test_light_and_dark_are_kept(address):
    with browser_page() as page:
        settled(page, f"{address}/scope")
        light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        page.locator("#theme").click()
        dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert dark != light
        settled(page, f"{address}/search")
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == dark


def test_plots_say_what_a_dot_is(address):
    with browser_page() as page:
        settled(page, f"{address}/scope")
        assert page.locator(".plot canvas").count() >= 2
        over = page.locator(".plot .u-over").first
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        said = page.locator(".plot .at").first
        before = said.inner_text()
        for step in range(40):
            x = box["x"] + box["width"] * step / 40
            for row in range(4):
                page.mouse.move(x, box["y"] + box["height"] * (row + 1) / 5)
        assert said.inner_text() != before
        assert said.inner_text().startswith("miniature/")


def test_a_mistake_is_told_where_the_answer_would_be(address):
    with browser_page() as page:
        page.goto(f"{address}/feature/miniature/none/3")
        assert "not indexed" in page.get_by_role("alert").inner_text()
