"""Does the documentation site hold everything, and does each of its links lead somewhere?

What is asked of the site is asked of the pages that came out of `mkdocs build` (conftest.py).
"""

import inspect
import json
import re
import tomllib
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

import docstrings
import mkdocs_hooks
import pages
import pytest
import reference
import yaml
from PIL import Image

import moddiff

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [stem for stem in NOTEBOOKS if stem[:2].isdigit()]
GUIDES = sorted(path.stem for path in (ROOT / "guides").glob("*.md") if path.stem != "README")
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


PROSE, CODE = {"p", "li", "td"}, {"code", "pre", "style", "script"}
MARKDOWN = r"\*\*\w|```|\n *([-*]|\d+\.) [\w¶]|\|--|\]\(|markdown=|\{ *[.#]\w"


class Page(HTMLParser):
    """A page, taken apart: its links, its anchors, and what a browser fetches to show it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.fetched, self.films = [], {""}, [], []
        self.prose, self.open = "", []  # the text of paragraphs and list items, without code
        self.feed(text)

    def handle_starttag(self, tag, pairs):
        told = dict(pairs)
        if tag in PROSE | CODE | {"article"}:
            self.open.append(tag)
            self.prose += "¶"
        self.anchors |= {told.get("id"), told.get("name")}
        if tag in ("a", "area") and "href" in told:
            self.links.append(told["href"])
        if tag == "link" and told["rel"] not in ("next", "prev", "canonical"):
            self.fetched.append(told["href"])
        if tag == "video":
            self.films.append(told["src"])
        self.fetched += [told[name] for name in ("src", "srcset", "poster", "data") if told.get(name)]

    def handle_endtag(self, tag):
        if self.open[-1:] == [tag]:
            self.open.pop()

    def handle_data(self, data):
        around = set(self.open)
        if "article" in around and PROSE & around and not CODE & around:
            self.prose += data


@pytest.fixture(scope="module")
def built(site):
    """{address below the site: Page} of every page."""
    return {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }


def inside(page, link):
    """Where a link of a page leads: a file of the site, and an anchor in it.   -> None: out of the site"""
    split = urlsplit(link)
    if split.scheme or split.netloc:
        return None
    path = normpath(join(dirname(page), unquote(split.path))) if split.path else page
    return (f"{path}/index.html" if split.path.endswith(("/", ".")) else path), unquote(split.fragment)


# ---- everything is there -------------------------------------------------------------------------------


def test_every_lesson_example_and_guide_is_in_the_navigation_in_the_order_of_reading(built):
    here = "notebooks/01_first_video/index.html"
    led_to = [found[0] for found in (inside(here, link) for link in built[here].links) if found]
    for folder, names in (("notebooks", NOTEBOOKS), ("guides", GUIDES)):
        assert {f"{folder}/{name}/index.html" for name in names} <= set(built)
    first = [led_to.index(f"notebooks/{stem}/index.html") for stem in LESSONS[1:]]
    assert first == sorted(first), "the lessons stand in another order than their numbers"
    listed = [
        page for entry in mkdocs_hooks.navigation() for pages in entry.values() for page in named(pages)
    ]
    assert sorted(listed) == sorted(set(listed)), "a page stands in the navigation twice"
    texts = {f"{path.removesuffix('.md')}/index.html" for path in listed}
    assert {f"notebooks/{stem}/index.html" for stem in NOTEBOOKS} <= texts
    assert {f"guides/{name}/index.html" for name in GUIDES} <= texts


def named(entry):
    """The pages of a piece of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in named(part)]


def test_lessons_and_readme_go_in_the_same_order():
    rows = re.findall(
        r"(?m)^\| \[\w+\]\(notebooks/(\w+)\.ipynb\).*\(guides/(\w+)\.md\)", pages.read("README.md")
    )
    assert [lesson for lesson, _ in rows] == LESSONS
    assert [guide for _, guide in rows] == [pages.guide_of(path) for path in pages.LESSONS]


def test_a_guide_without_a_lesson_is_not_forgotten(monkeypatch, tmp_path):
    (tmp_path / "guides").mkdir()
    for name in ("README", "pipeline", "full_size"):
        (tmp_path / "guides" / f"{name}.md").write_text("# a guide\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.guides() == ["pipeline", "full_size"]


def test_every_section_of_the_readme_stands_on_one_page(built):
    addresses = {page: page.removesuffix(".md") + "/index.html" for page in pages.section_pages().values()}
    addresses["index.md"] = "index.html"
    for anchor, page in pages.section_pages().items():
        assert [name for name in addresses if anchor in built[addresses[name]].anchors] == [page]


def test_the_first_page_plays_the_films_of_the_readme(site, built):
    section = pages.read("README.md").partition("\n## A sentence becomes a video")[2].partition("\n## ")[0]
    films = re.findall(r'<img src="(guides/figures/[^"]+)"', section)
    shown = [inside("index.html", source)[0] for source in built["index.html"].fetched]
    assert films and [name for name in shown if name.endswith(".webp")] == films
    assert all(Image.open(site / name).n_frames > 1 for name in films)
    text = (site / "index.html").read_text(encoding="utf-8")
    assert text.count("<figcaption>") == section.count("<img") - 1  # the word map has none


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_page_plays_the_films_and_shows_the_pictures_of_its_notebook(site, built, stem):
    book = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    data = [
        output["data"] for cell in book["cells"] for output in cell.get("outputs", []) if "data" in output
    ]
    written = "".join("".join(kinds.get("text/html", "")) for kinds in data)
    page = built[f"notebooks/{stem}/index.html"]
    assert page.films == re.findall(r'<video [^>]*src="([^"]+)"', written)
    assert all(film.startswith("data:video/mp4;base64,") for film in page.films)
    pictures = [kinds["image/png"] for kinds in data if "image/png" in kinds and "text/html" not in kinds]
    shown = [link for link in page.fetched if link.endswith(".png") and stem in link]
    assert len(shown) == len(pictures)
    assert all(
        (site / inside(f"notebooks/{stem}/index.html", link)[0]).read_bytes()[:4] == b"\x89PNG"
        for link in shown
    )


def test_every_public_name_is_in_the_reference(built):
    anchors = set().union(*(page.anchors for name, page in built.items() if name.startswith("api/")))
    front = [getattr(moddiff, name) for name in moddiff.__all__]
    assert {f"{thing.__module__}.{thing.__qualname__}" for thing in front} <= anchors
    for room in moddiff._ROOMS:
        assert f"api/{room}/index.html" in built
        module = import_module(f"moddiff.{room}")
        own = [
            thing
            for name, thing in vars(module).items()
            if (inspect.isfunction(thing) or inspect.isclass(thing))
            and f"{thing.__module__}.".startswith(f"moddiff.{room}.")
            and name[0] != "_"
        ]
        missing = {f"{thing.__module__}.{thing.__qualname__}" for thing in own} - anchors
        assert not missing, f"api/{room}.md lacks {missing}"


def test_no_markdown_is_left_in_the_prose(built):
    """What belongs to an item stands four spaces in; an item after that has an empty line before it."""
    for name, page in built.items():
        if not name.startswith("api/"):
            left = re.search(MARKDOWN, page.prose)
            assert not left, f"{name}: {page.prose[max(0, left.start() - 60) : left.end() + 60]!r}"


# ---- every link leads somewhere ------------------------------------------------------------------------


def test_every_link_leads_to_a_page_and_a_place_in_it(site, built):
    for page, parts in built.items():
        if page == "404.html":  # shown at any address: its links begin at the root
            continue
        for link in [*parts.links, *parts.fetched]:
            found = inside(page, link)
            if not found:
                continue
            path, anchor = found
            assert (site / path).is_file(), f"{page} links to {link}, which is not there"
            if anchor and path in built and not anchor.startswith("__"):  # codelineno anchors and the like
                assert anchor in built[path].anchors, f"{page} links to {link}; there is no such place"


def test_links_into_the_repository_name_files_that_are_there(built):
    count = 0
    for page, parts in built.items():
        for link in parts.links:
            if link.startswith(f"{REPOSITORY}/"):
                kind, branch, path = link.removeprefix(f"{REPOSITORY}/").split("/", 2)
                assert kind in ("blob", "tree") and branch == "main"
                assert (ROOT / path.partition("#")[0]).exists(), f"{page} links to {link}"
                count += 1
    assert count >= len(NOTEBOOKS)


def test_nothing_is_fetched_from_elsewhere(site, built):
    for page, parts in built.items():
        outside = [link for link in parts.fetched if re.match(r"(\w+:)?//", link)]
        assert not outside, f"{page} fetches {outside}"
    for path in site.rglob("*.css"):
        assert not re.search(r"""(url\(|@import )['"]?(https?:)?//""", path.read_text(encoding="utf-8")), (
            path.name
        )


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_lesson_opens_in_colab_and_binder(built, stem):
    links = built[f"notebooks/{stem}/index.html"].links
    name = REPOSITORY.removeprefix("https://github.com/")
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    colab = f"https://colab.research.google.com/github/{name}/blob/main/"
    binder = f"https://mybinder.org/v2/gh/{name}/main?labpath="
    for start in (colab, binder):
        paths = [unquote(link.removeprefix(start)) for link in links if link.startswith(start)]
        assert paths == [f"notebooks/{stem}.ipynb"]


def test_binder_installs_what_the_notebooks_need():
    asked = pages.read(".binder/requirements.txt").splitlines()
    assert "-e .[notebooks]" in asked and "-c ../constraints.txt" in asked
    python = yaml.safe_load(pages.read(".github/workflows/pages.yml"))["jobs"]["site"]["steps"][1]["with"]
    assert pages.read(".binder/runtime.txt") == f"python-{python['python-version']}\n"


def test_a_fork_links_to_itself(monkeypatch):
    monkeypatch.setenv("REPOSITORY", "https://github.com/someone/else")
    text = mkdocs_hooks.with_buttons("notebooks/05_vae.md", "# The title\n\nThe text.\n")
    assert text.startswith("# The title\n\n") and text.endswith("The text.\n")
    assert "mybinder.org/v2/gh/someone/else/main?labpath=notebooks%2F05_vae.ipynb" in text
    assert "(../guides/vae.md)" in text and REPOSITORY not in text


# ---- the pieces ----------------------------------------------------------------------------------------


def test_links_are_turned_and_those_to_nowhere_are_left_for_mkdocs_to_find():
    known = {"notebooks/05_vae.md", "guides/vae.md", "index.md"}

    def turned(link, page="guides/dit.md"):
        return pages.relinked(f"see [it]({link})", page, known, "ADDRESS")[9:-1]

    assert turned("../notebooks/05_vae.ipynb#exercise") == "../notebooks/05_vae.md#exercise"
    assert turned("vae.md") == "vae.md" and turned("https://arxiv.org/abs/1") == "https://arxiv.org/abs/1"
    assert turned("../moddiff/dit/model.py") == "ADDRESS/blob/main/moddiff/dit/model.py"
    assert turned("../tests") == "ADDRESS/tree/main/tests"
    assert turned("../README.md") == "../index.md"
    assert turned("../README.md#how-exact") == "../measured.md#how-exact"
    assert (
        turned("#how-exact", "index.md") == "measured.md#how-exact" and turned("#how-exact") == "#how-exact"
    )
    assert turned("nowhere.md") == "nowhere.md" and turned("../../other/x.md") == "../../other/x.md"
    code = "`[it](../moddiff/dit/model.py)`\n```python\nx[0](../tests)\n```"
    assert pages.relinked(code, "guides/dit.md", known, "ADDRESS") == code


def test_a_section_that_got_another_name_is_missed_by_name(monkeypatch):
    read = pages.read
    monkeypatch.setattr(pages, "read", lambda name: read(name).replace("## How fast?", "## How quick?"))
    with pytest.raises(ValueError, match=r"README.md has no section.*How fast"):
        pages.readme_pages()


def test_a_list_below_its_sentence_gets_the_empty_line_that_it_needs():
    text = "All:\n- one\n  more\n- two\n\n```text\nAll:\n- one\n```\nAnd:\n1. first\n2. second"
    assert pages.spaced(text) == text.replace("All:\n- one\n ", "All:\n\n- one\n ").replace(
        "And:\n", "And:\n\n"
    )


def test_films_that_no_longer_stand_in_a_table_are_noticed():
    table = '| | |\n|---|---|\n| <img src="a.webp"> | <img src="b.webp"> |\n| one | two |'
    assert pages.grid(table).count("<figure") == 2
    with pytest.raises(ValueError, match="films and captions in turn"):
        pages.grid(table.replace("| one | two |", "| one | <img src='c.webp'> |"))
    with pytest.raises(ValueError, match="shows no films"):
        pages.without_gallery("## A section\n\nwithout any")


def test_a_control_without_its_kernel_leaves_its_still_picture():
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox()"}
    assert pages.shown({"data": widget}, "a.png", {}) == ""
    assert pages.shown({"text": ["a < b"]}, "a.png", {}) == '<pre class="output">a &lt; b</pre>'
    pictures = {}
    drawn = pages.shown({"data": {"image/png": "AAAA", "text/plain": "Figure: a [b]\nc"}}, "a.png", pictures)
    assert drawn.startswith("![a  b  c](a.png)") and pictures == {"a.png": b"\0\0\0"}


def test_columns_of_a_docstring_become_a_table():
    text = "x   [b, n], `as` is\n    and more\ny   < 1\nWhat comes after."
    assert docstrings.tabled(text) == (
        "<table><tr><td><code>x</code></td><td>[b, n], <code>as</code> is and more</td></tr>"
        "<tr><td><code>y</code></td><td>&lt; 1</td></tr></table>\n\nWhat comes after."
    )
    for prose in ("Two sentences.  Not a column.", "a\nb", "    x   y"):
        assert docstrings.tabled(prose) == prose


def test_an_index_in_a_docstring_is_no_link():
    assert docstrings.without_references("of A[x][y], `B[x][y]`") == "of A[x]\\[y], `B[x][y]`"


def test_a_room_offers_what_its_front_imports():
    hooks = dict(reference.offered(reference.PACKAGE / "hooks"))
    assert hooks["capture"] == "moddiff.hooks.verbs.capture"
    tiny = dict(reference.offered(reference.PACKAGE / "tiny"))
    assert tiny["score.judge"] == "moddiff.tiny.score.judge"
