"""The steer page in a browser: adding, sliding, streaming, stopping, restoring, a dose curve."""

import pytest
from explorer import browser_page, needs_browser, served

from gemscope.explorer import Limits
from gemscope.features import Store

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def site(small_store):
    with served(small_store, limits=Limits(new_tokens=400)) as address:
        yield address


@pytest.fixture(scope="module")
def lively(small_store, indexed):
    table = Store.open(small_store).features(indexed[0], ["density", "max"]).to_pylist()
    good = [r for r in table if 0.001 < r["density"] < 0.05]
    return max(good, key=lambda r: r["max"])["feature"]


def test_adding_sliding_and_generating(site, indexed, lively):
    with browser_page() as page:
        page.goto(f"{site}/steer")
        assert page.locator("#go").is_disabled()
        page.keyboard.press("/")
        page.keyboard.type(f"{indexed[0]}/{lively}")
        page.click("#found button")
        page.wait_for_selector(".edit")
        page.fill("#q", "5")
        page.wait_for_selector(f"#found li:has-text('/5'):not(:has-text('{lively}'))")
        page.click("#found button")
        page.wait_for_selector(".edit >> nth=1")
        second = page.locator(".edit").nth(1)
        second.locator("select[name=mode]").select_option("ablate")
        assert second.locator(".slide").is_hidden()
        first = page.locator(".edit").first
        first.locator(".slide").focus()
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        assert float(first.locator(".amount").input_value()) == 1.5
        assert "strength=1.5xmax" in page.url
        page.fill("[name=max_new_tokens]", "12")
        page.click("#go")
        page.wait_for_selector("#state:has-text('done')")
        told = page.inner_text("#baseline"), page.inner_text("#steered")
        assert all(len(text) > 20 for text in told)
        # The permalink has it all, and runs nothing by itself.
        page.goto(page.get_attribute("#permalink", "href").join([site, ""]))
        assert page.locator(".edit").count() == 2
        assert page.locator(".amount").first.input_value() == "1.5"
        assert page.inner_text("#steered") == ""
        page.click("#go")
        page.wait_for_selector("#state:has-text('done')")
        assert (page.inner_text("#baseline"), page.inner_text("#steered")) == told
        page.click(".remove >> nth=1")
        assert page.locator(".edit").count() == 1
        assert "ablate" not in page.url
        assert (page.wrongs, page.outside) == ([], [])


def test_stopping(site, indexed, lively):
    with browser_page() as page:
        page.goto(f"{site}/steer?feature={indexed[0]}/{lively}&strength=0.2xmax&max_new_tokens=400")
        page.click("#go")
        page.wait_for_selector("#state:has-text('without edits')")
        page.click("#stop")
        page.wait_for_selector("#state:has-text('stopped')")
        assert page.locator("#go").is_enabled()
        assert page.inner_text("#steered").count("\n") < 3
        assert (page.wrongs, page.outside) == ([], [])


def test_mistakes_are_told_in_place(site, indexed, lively):
    with browser_page() as page:
        page.goto(f"{site}/steer?feature={indexed[0]}/{lively}&strength=1&positions=90:95")
        page.click("#go")
        page.wait_for_selector("#wrong:not([hidden])")
        assert "90:95" in page.inner_text("#wrong")
        page.fill("#q", f"{indexed[0]}/99999")
        page.wait_for_selector("#found .mistake")
        page.goto(f"{site}/steer?feature=nonsense")
        assert "names no feature" in page.inner_text(".mistake")
        assert page.outside == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_dose_curve(site, indexed, lively, width, dark):
    with browser_page(width=width, dark=dark) as page:
        page.goto(f"{site}/steer?feature={indexed[0]}/{lively}&strength=1xmax")
        page.click(".dose")
        page.wait_for_selector("#plots canvas", timeout=60_000)
        assert page.locator("#plots canvas").count() == 3
        assert page.locator("#dose-table tr").count() == 9
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("#theme")  # drawn again in the other colours
        assert page.locator("#plots canvas").count() == 3
        assert (page.wrongs, page.outside) == ([], [])
