"""The map in a real browser: waiting, moving, the tree, and many points."""

import json
import re
import shutil

import pytest
from explorer import browser_page, needs_browser, served

pytestmark = [pytest.mark.slow, needs_browser]

DARK = """() => { const c = document.querySelector('canvas'), d = c.getContext('2d')
    .getImageData(0, 0, c.width, c.height).data; let n = 0;
    for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"""


@pytest.fixture(scope="module")
def store(small_store, tmp_path_factory):
    """A copy of `small_store` that a map may be kept in."""
    return shutil.copytree(small_store, tmp_path_factory.mktemp("map") / "store")


def test_it_is_waited_for_moved_and_opened(store, indexed):
    with served(store) as address, browser_page() as page:
        page.goto(f"{address}/map")
        page.click(f"a[href='/map/{indexed[0]}']")
        page.wait_for_selector("text=The map is being made")
        page.wait_for_selector("#map[data-ready]", timeout=120_000)
        whole = page.evaluate(DARK)
        assert whole > 1000
        page.focus("canvas")
        for key in ("+", "+", "+", "+", "+"):
            page.keyboard.press(key)
        page.wait_for_timeout(200)
        near = page.evaluate(DARK)
        assert near != whole
        # What is nearest the middle is told, and Enter opens it.
        told = page.inner_text(".tip")
        assert re.match(r"\d+ ", told)
        assert "density" in told
        page.keyboard.press("0")
        page.wait_for_timeout(200)
        page.keyboard.press("ArrowLeft")
        number = re.match(r"(\d+) ", page.inner_text(".tip"))[1]
        assert page.wrongs == []
        page.keyboard.press("Enter")
        page.wait_for_url("**/feature/**")
        assert page.url.endswith(f"{indexed[0]}/{number}")
        assert page.outside == []


def test_a_cluster_of_the_tree_is_shown_on_the_map(store, indexed):
    with served(store) as address, browser_page() as page:
        page.goto(f"{address}/map/{indexed[0]}")
        page.wait_for_selector("#map[data-ready]", timeout=120_000)
        before = page.evaluate("document.querySelector('canvas').toDataURL()")
        page.locator(".groups > li > details > summary").first.click()
        page.wait_for_selector(".groups details[open] .members a")
        page.locator(".groups details[open] li:has(> .members) > .pick").first.click()
        assert page.locator(".pick[aria-pressed=true]").count() == 1
        page.wait_for_timeout(200)
        assert page.evaluate("document.querySelector('canvas').toDataURL()") != before
        page.wait_for_url("**cluster=*")
        page.reload()
        page.wait_for_selector("#map[data-ready]")
        assert page.is_visible("[data-do=none]")
        page.click("[data-do=none]")
        assert "cluster=" not in page.url
        page.select_option(".colour", "density")
        assert "%" in page.inner_text(".legend")
        page.fill(".find input", "17")
        page.press(".find input", "Enter")
        assert page.inner_text(".tip").startswith("17 ")


def many(n):
    """A map of `n` features, as the server says one."""
    size = 20
    clusters = [
        {"id": c, "name": f"c{c}", "tokens": [f"c{c}"], "size": size, "cohesion": 0.5,
         "members": list(range(c * size, (c + 1) * size))}
        for c in range(n // size)
    ]  # fmt: skip
    points = [
        {"feature": i, "x": (i * 7919) % 1000 / 10, "y": (i * 104729) % 997 / 10,
         "cluster": i // size, "density": 10.0 ** -(i % 6), "max": 3.0, "explanation": f"e {i}"}
        for i in range(n)
    ]  # fmt: skip
    return {"dictionary": "x", "on": "together", "features": n, "clusters": clusters, "map": points}


def test_sixteen_thousand_points_move_smoothly(store, indexed):
    with served(store) as address, browser_page() as page:
        said = json.dumps(many(16_000))
        page.route("**/api/map/**", lambda r: r.fulfill(body=said, content_type="application/json"))
        page.goto(f"{address}/map/{indexed[0]}")
        page.wait_for_selector("#map[data-ready='16000']", timeout=120_000)
        frames = page.evaluate("""async () => {
            const c = document.querySelector('canvas'), times = [];
            for (let i = 0; i < 20; i++) {
                const t = performance.now();
                const deltaY = i < 10 ? -60 : 60;
                c.dispatchEvent(new WheelEvent('wheel', {deltaY, cancelable: true}));
                await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
                times.push(performance.now() - t);
            }
            return times.sort((a, b) => a - b)[10]; }""")
        # Two frames pass; half of them are within 100 ms also where the machine draws by itself.
        assert frames < 100
        assert page.wrongs == []
