"""Visits to the page of a server in a browser, Debian's Chromium."""

import contextlib
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

HINT = "#question textarea"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_a_browser = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine")


@contextlib.contextmanager
def opened() -> Iterator:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that is open, with what a visitor does on it."""

    def __init__(self, browser, url, **options):
        self.asked_of = set()
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        self.page.set_default_timeout(60_000)
        self.page.on("request", lambda request: self.asked_of.add(urlsplit(request.url).netloc))
        self.page.goto(url)
        self.page.wait_for_selector(HINT)

    def give(self, name, *files):
        """Uploads files, and waits until they are here."""
        self.page.set_input_files(f"#upload-{name} input[type=file]", [str(file) for file in files])
        self.page.wait_for_selector(f"#upload-{name} .file-preview")

    def ask(self, question=None):
        """Asks, and waits until the answer is whole."""
        if question:
            self.page.fill(HINT, question)
        count = len(self.answers)
        self.page.click("#question .submit-button")
        self.page.wait_for_function(
            """count => {
                const said = [...document.querySelectorAll("#talk .message.bot")].map(one => one.innerText.trim());
                const isWaiting = said.at(-1) === "Loading content" || !document.querySelector("#question .submit-button");
                return said.length > count && !isWaiting;
            }""",
            arg=count,
        )
        return self.answers[-1]

    @property
    def answers(self):
        return [one.inner_text().strip() for one in self.page.query_selector_all("#talk .message.bot")]

    @property
    def talk(self):
        return self.page.inner_text("#talk")
