"""What does the documentation site show?  Its pages, written from README, notebooks and guides.

Plain functions from the repository's files to Markdown; mkdocs_hooks.py hands the results to mkdocs.
"""

import base64
import html
import json
import re
import tomllib
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from textwrap import dedent

from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem[:2].isdigit()]
EXAMPLES = [path for path in NOTEBOOKS if path not in LESSONS]
# Sections of the README that have a page of their own. What is named nowhere here stands on start.md.
SECTIONS = {
    "index.md": ("The notebooks",),
    "measured.md": ("How good are the tiny models?", "How exact?", "How fast?"),
}
FILMS = "A sentence becomes a video"  # the section that shows them; they go to the first page
WHOLE = ("CONTRIBUTING.md", "CHANGELOG.md", "moddiff/tiny/CARD.md")  # pages as they stand
CODE = r"(?ms)(^```.*?^```|`[^`\n]*`)"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def repository():
    """The address of the repository, from pyproject.toml."""
    return tomllib.loads(read("pyproject.toml"))["project"]["urls"]["Repository"]


def outside_code(change, text):
    """The text with `change` made to all of it but its code."""
    pieces = re.split(CODE, text)
    return "".join(piece if i % 2 else change(piece) for i, piece in enumerate(pieces))


def spaced(text):
    """The text with an empty line before each list, which GitHub does not need and Python's Markdown does."""
    pieces = re.split(r"(?ms)(^```.*?^```)", text)
    line_before_a_list = r"(?m)^(?![-*] |\d+\. |\s)(.+)\n(?=(?:[-*]|1\.) )"
    return "".join(
        piece if i % 2 else re.sub(line_before_a_list, r"\1\n\n", piece) for i, piece in enumerate(pieces)
    )


# ---- notebooks and guides ------------------------------------------------------------------------------


def cells(path):
    """(kind, source, outputs) of each cell of a notebook."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        yield cell["cell_type"], "".join(cell["source"]), cell.get("outputs", [])


def guide_of(lesson):
    """A lesson's guide: of its own name, or else the one it links to at its end ("pipeline" for 01)."""
    name = lesson.stem.partition("_")[2]
    if (ROOT / "guides" / f"{name}.md").exists():
        return name
    prose = "".join(source for kind, source, _ in cells(lesson) if kind == "markdown")
    return re.findall(r"\]\(\.\./guides/(\w+)\.md", prose)[-1]


def guides():
    """Names of all guides: first those of the lessons, in the lessons' order, then the others."""
    there = {path.stem for path in (ROOT / "guides").glob("*.md")} - {"README"}
    first = [name for name in dict.fromkeys(map(guide_of, LESSONS)) if name in there]
    return first + sorted(there - set(first))


def notebook_page(path):
    """A notebook in Markdown, and the pictures in it.   -> text, {file name: bytes}"""
    parts, pictures = [], {}
    for kind, source, outputs in cells(path):
        if kind == "markdown":
            # Without this word, Markdown between HTML tags would stay as it is typed.
            parts.append(source.replace("<details>", '<details markdown="1">'))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in outputs:
            name = f"{path.stem}_{len(pictures) + 1}.png"
            parts.append(shown(output, name, pictures))
    return "\n\n".join(filter(None, parts)) + "\n", pictures


def shown(output, name, pictures):
    """One output of a cell in Markdown. A picture is put into `pictures`, under its name.

    A live control needs a kernel: its still picture stands for it.
    """
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items() if "json" not in kind}
    written = data.get("text/html", "")
    if "text" in output:
        return f'<pre class="output">{html.escape("".join(output["text"]))}</pre>'
    if '<div class="highlight">' in written:  # source code: in the colours of the site, light or dark
        return f"```python\n{dedent(data['text/plain']).rstrip()}\n```"
    if written:
        return f'<div class="output">\n{written}\n</div>'
    if "image/png" in data:
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![{described(data.get('text/plain', ''))}]({name}){{ .output loading=lazy }}"
    control = "application/vnd.jupyter.widget-view+json" in output["data"]
    return "" if control else f'<pre class="output">{html.escape(data["text/plain"])}</pre>'


def described(plain):
    """What a figure calls itself, for those who do not see it."""
    return re.sub(r"[\[\]\n\"]", " ", plain.removeprefix("Figure: ")).strip() or "figure"


def guide_page(name):
    """A guide whose quotes say which file they are from."""
    text = read(f"guides/{name}.md")
    text = re.sub(r"(?m)^```py-quote$", f"```py-quote {name}.py", text)
    return re.sub(r"(?m)^```py-quote (\S+)$", r'```python title="moddiff/\1"', text)


# ---- the README, in several pages ----------------------------------------------------------------------


def readme_pages():
    """The README's sections, spread over pages, its films in front.   -> {page: text}"""
    text = re.sub(r"(?m)^<!--.*?-->\n", "", read("README.md"))
    intro, *sections = re.split(r"(?m)^(?=## )", text)
    titled = {section[3:].partition("\n")[0]: section for section in sections}
    needed = {FILMS}.union(*SECTIONS.values())
    missing = needed - set(titled)
    if missing:
        raise ValueError(f"README.md has no section {missing}; mend SECTIONS in guides/site/pages.py")
    begin, gallery = without_gallery(titled[FILMS])
    titled[FILMS] = begin
    pages = {page: "\n".join(titled.pop(title) for title in titles) for page, titles in SECTIONS.items()}
    title, line, rest = intro.split("\n\n", 2)
    pages["index.md"] = "---\nhide: [navigation]\n---\n" + "\n\n".join(
        (title, line, gallery, rest, pages["index.md"])
    )
    pages["measured.md"] = f"# What was measured\n\n{pages['measured.md']}"
    pages["start.md"] = "# Install and run\n\n" + "\n".join(titled.values())
    return {page: outside_code(as_markdown, text) for page, text in pages.items()}


def section_pages():
    """{anchor of a section of the README: the page it stands on}."""
    homes = {title: page for page, titles in SECTIONS.items() for title in titles}
    titles = re.findall(r"(?m)^## (.*)$", read("README.md"))
    return {slugify(title, "-"): homes.get(title, "start.md") for title in titles}


def without_gallery(section):
    """The section that holds the films, in two: without them, and the films with what is said of them."""
    paragraphs = section.split("\n\n")
    tables = [i for i, paragraph in enumerate(paragraphs) if "<img" in paragraph]
    if not tables:
        raise ValueError(f"README.md shows no films in {FILMS!r}; the first page needs them")
    first, last = tables[0] - 1, tables[-1] + 2  # from what introduces the films to how they were made
    films = [grid(paragraph) if "|" in paragraph else paragraph for paragraph in paragraphs[first:last]]
    return "\n\n".join(paragraphs[:first] + paragraphs[last:]), "\n\n".join(films)


def grid(table):
    """A table whose rows are films and captions in turn, as figures that find their own places."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = [row for row in rows if any(row) and not set("".join(row)) <= set("-: ")]
    pairs = [
        pair for films, captions in zip(rows[::2], rows[1::2]) for pair in zip(films, captions) if all(pair)
    ]
    if not pairs or any("<img" not in film or "<img" in caption for film, caption in pairs):
        raise ValueError("the README's films no longer stand in rows of films and captions in turn")
    figures = [
        f'<figure markdown="1">\n{film}\n<figcaption>{caption}</figcaption>\n</figure>'
        for film, caption in pairs
    ]
    return '<div class="films" markdown="1">\n' + "\n".join(figures) + "\n</div>"


def as_markdown(text):
    """HTML pictures in Markdown, so that mkdocs finds and checks their files."""
    for tag in re.findall(r"<img [^>]*>", text):
        found = dict(re.findall(r'(\w+)="([^"]*)"', tag))
        size = f"{{ width={found['width']} }}" if "width" in found else ""
        text = text.replace(tag, f"![{found.get('alt', '')}]({found['src']}){size}")
    return text


# ---- links ---------------------------------------------------------------------------------------------


def relinked(text, page, known, address):
    """The text of a page with its links made right for the site.

    A notebook is a page here; what is no page, but a file of the repository, is shown at its address. Links
    that lead nowhere stay as they are: mkdocs finds them.
    """
    of_readme = section_pages()

    def right(found):
        target, mark, anchor = found[1].partition("#")
        path = normpath(join(dirname(page), target))
        turned = re.sub(r"\.ipynb$", ".md", target)
        if path == "README.md" or (not target and page in of_readme.values()):
            home = of_readme.get(anchor, "index.md")
            return f"]({relpath(home, dirname(page) or '.')}{mark}{anchor})"
        if re.match(r"\w+:", target) or not target:
            return found[0]
        if normpath(join(dirname(page), turned)) in known:
            return f"]({turned}{mark}{anchor})"
        if path.startswith("..") or not (ROOT / path).exists():
            return found[0]
        return f"]({address}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{mark}{anchor})"

    return outside_code(lambda prose: re.sub(r"\]\(([^)\s]+)\)", right, prose), text)


def badges(path, address):
    """{what it does: address}: where a notebook opens without an installation, and its source."""
    owner_and_name = re.sub(r"^https://github\.com/", "", address)
    file = f"notebooks/{path.name}"
    quoted = file.replace("/", "%2F")
    return {
        "Open in Colab": f"https://colab.research.google.com/github/{owner_and_name}/blob/main/{file}",
        "Open in Binder": f"https://mybinder.org/v2/gh/{owner_and_name}/main?labpath={quoted}",
        "Source": f"{address}/blob/main/{file}",
    }


def headed(text, links, remark=""):
    """A page with buttons below its title."""
    title, rest = text.split("\n", 1)
    buttons = " ".join(f"[{label}]({target}){{ .md-button .open }}" for label, target in links.items())
    return "\n\n".join(filter(None, (title, buttons, remark, rest)))
