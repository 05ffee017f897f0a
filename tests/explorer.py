"""A running explorer, and a real browser to drive it with."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import uvicorn

from gemscope.explorer import Access, Workbench, create_app, listen
from gemscope.explorer._serve import configured
from gemscope.features import Store

CHROMIUM = next(
    (p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).exists()), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")

GEMSCOPE = [sys.executable, "-m", "gemscope"]


class Serving:
    """`gemscope serve` as a process, with a cache of its own; or another verb that serves."""

    def __init__(self, *arguments, cache, verb=("serve",)):
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*GEMSCOPE, *verb, "--port", "0", *map(str, arguments)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.said = []
        while (line := self.process.stdout.readline()) and not line.startswith("gemscope explorer"):
            self.said.append(line)
        self.address = line.removeprefix("gemscope explorer: ").partition("/  (")[0]
        assert self.address.startswith("http"), line + self.process.stderr.read()

    def stop(self, how=signal.SIGINT):
        """Exit code, what it wrote to stderr, and seconds until it had ended."""
        began = time.monotonic()
        self.process.send_signal(how)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err, time.monotonic() - began


@contextmanager
def served(*stores, access=None, **options):
    """The address of a server on `stores`, folders or opened ones."""
    opened = [s if isinstance(s, Store) else Store.open(s) for s in stores]
    listening = listen("127.0.0.1", 0)
    app = create_app(Workbench(opened, **options), access or Access())
    server = uvicorn.Server(configured(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


@contextmanager
def browser_page(*, width=1280, height=900, dark=False, language="en-GB"):
    """A page of headless chromium that may reach this machine only; what went wrong in it is in
    `page.wrongs`, what it tried to reach elsewhere in `page.outside`.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": width, "height": height}, locale=language,
            color_scheme="dark" if dark else "light",
        )  # fmt: skip
        page = context.new_page()
        page.wrongs, page.outside = [], []
        page.on("pageerror", lambda error: page.wrongs.append(str(error)))
        page.on("console", lambda m: page.wrongs.append(m.text) if m.type == "error" else None)

        def local(route):
            if route.request.url.startswith(("http://127.0.0.1:", "data:")):
                route.continue_()
            else:
                page.outside.append(route.request.url)
                route.abort()

        context.route("**/*", local)
        try:
            yield page
        finally:
            browser.close()


def pages_of(addresses):
    """An address of every page, on a store that has the dictionaries `addresses`."""
    one, other = (quote(a) for a in (addresses[0], addresses[-1]))
    text = quote("def f(x):\n    return <x>")
    return {
        "microscope": f"/?text={text}&sae={one}",
        "feature": f"/feature/{one}/3",
        "search": "/search?q=return",
        "map": f"/map/{one}",
        "compare": f"/compare?sae={one}",
        "steer": f"/steer?feature={other}/3&prompt=def",
        "graphs": f"/graphs?prompt={text}",
        "scope": "/scope",
        "first": "/",
    }
