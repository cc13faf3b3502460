"""Is the site as readers need it?  A browser plays its films, searches, and looks at narrow pages."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

PAGES = ("", "start/", "notebooks/01_first_video/", "notebooks/03_hooks/", "guides/weights/", "api/pipeline/")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def asked(page):
    """The addresses that pages ask for while they are looked at."""
    addresses = []
    page.on("request", lambda request: addresses.append(request.url))
    return addresses


def test_films_play_and_nothing_is_asked_of_other_machines(page, asked, address):
    page.goto(f"{address}notebooks/01_first_video/")
    page.locator("video").first.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('video').currentTime > 0.2")
    page.goto(address)
    page.wait_for_function(
        "[...document.querySelectorAll('.films img')].every(film => film.naturalWidth > 0)"
    )
    assert page.locator(".films img").count() >= 7
    assert not [url for url in asked if not url.startswith((address, "data:"))]


def test_the_search_finds_a_word_of_a_lesson(page, address):
    page.goto(address)
    page.locator(".md-search__input").click()
    page.keyboard.type("modulation")
    found = page.locator(".md-search-result__item a[href*='notebooks/07_dit']")
    found.first.wait_for(state="attached")
    assert any("modulation" in text.lower() for text in found.all_text_contents())


@pytest.mark.parametrize("width", (400, 1280))
def test_no_page_is_wider_than_its_window(page, address, width):
    page.set_viewport_size(dict(width=width, height=900))
    for name in PAGES:
        page.goto(address + name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
