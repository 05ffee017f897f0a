"""Comparing in a real browser: pasting, the plot, and what it links to."""

import pytest
from explorer import browser_page, needs_browser, served

pytestmark = [pytest.mark.slow, needs_browser]


def test_pasted_texts_are_compared_and_a_point_opens_its_feature(small_store, indexed):
    with served(small_store) as address, browser_page() as page:
        page.goto(f"{address}/compare")
        for key, text in (
            ("a", "def f(x):\n    return x\n\n" * 150),
            ("b", "The cat sat.\n\n" * 9),
        ):
            page.select_option(f"select[name={key}]", f"pasted {key}=text:")
            page.fill(f"textarea[name={key}_text]", text)
        page.select_option("select[name=sae]", indexed[0])
        page.click("button.main")
        page.wait_for_selector("#volcano[data-ready]", timeout=120_000)
        # The long text is not in the address, the short one is.
        assert "kept%3A" in page.url
        assert "The+cat" in page.url
        assert len(page.url) < 2_000
        assert page.locator("#volcano canvas").count() == 1
        assert "def f(x)" in page.input_value("textarea[name=a_text]")
        # A point under the pointer tells its feature, and opens it.
        place = page.evaluate("""() => {
            const over = document.querySelector('.u-over').getBoundingClientRect();
            return [over.x, over.y, over.width, over.height]; }""")
        for step in range(400):
            page.mouse.move(
                place[0] + place[2] * (step % 40 + 0.5) / 40,
                place[1] + place[3] * (1 - (step // 40 + 0.5) / 10),
            )
            if page.is_visible(".volcano .tip"):
                break
        number = page.inner_text(".volcano .tip").split()[0]
        assert page.wrongs == []
        page.mouse.down()
        page.mouse.up()
        page.wait_for_url("**/feature/**")
        assert page.url.endswith(f"{indexed[0]}/{number}")
        assert page.outside == []


def test_a_mistake_is_told_beside_the_form(small_store, indexed):
    with served(small_store) as address, browser_page(width=390, height=800, dark=True) as page:
        page.goto(f"{address}/compare?sae={indexed[0]}&a=x=/etc/passwd&b=code")
        assert "is not offered here" in page.inner_text("#compared")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("select[name=a]").count() == 1
