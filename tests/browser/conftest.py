"""A browser for the tests of this folder.

Needs Chromium (Debian: apt-get install chromium; .ci/run does so where it may) and playwright; where there is
none, the tests are skipped.
"""

import shutil

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 240_000  # milliseconds, for anything that a busy machine may take long over


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium (or Chrome) for the browser tests")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright; pip install -c constraints.txt -e '.[test]'"
    )
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, headless=True, args=flags, timeout=PATIENCE
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()
