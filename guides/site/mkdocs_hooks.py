"""How do the pages come into mkdocs?  The hooks that mkdocs.yml names: navigation, pages, links, buttons."""

import os

import pages
import reference
from mkdocs.structure.files import File

PICTURES = (".png", ".webp")


def address():
    """Of the repository: a fork that publishes its own site says where it stands."""
    return os.environ.get("REPOSITORY") or pages.repository()


def navigation():
    """Every page, in the order in which one reads. Titles are the pages' own."""
    return [
        {"Home": "index.md"},
        {"Start": ["start.md", {"What was measured": "measured.md"}, "moddiff/tiny/CARD.md"]},
        {"Lessons": [f"notebooks/{path.stem}.md" for path in pages.LESSONS]},
        {"Guides": ["guides/README.md", *(f"guides/{name}.md" for name in pages.guides())]},
        {"Examples": [f"notebooks/{path.stem}.md" for path in pages.EXAMPLES]},
        {"API": list(reference.api_pages())},
        {"Taking part": ["CONTRIBUTING.md", "CHANGELOG.md"]},
    ]


def contents():
    """{page or picture: what is in it} of the whole site."""
    found = pages.readme_pages() | reference.api_pages()
    found |= {name: pages.read(name) for name in (*pages.WHOLE, "guides/README.md")}
    found |= {f"guides/{name}.md": pages.guide_page(name) for name in pages.guides()}
    for path in (pages.ROOT / "guides" / "figures").iterdir():
        if path.suffix in PICTURES:
            found[f"guides/figures/{path.name}"] = path.read_bytes()
    for path in pages.NOTEBOOKS:
        text, pictures = pages.notebook_page(path)
        found[f"notebooks/{path.stem}.md"] = text
        found |= {f"notebooks/{name}": picture for name, picture in pictures.items()}
    return found


def with_buttons(page, text):
    """A lesson or a guide, with what one may want to open from there."""
    lessons = {f"notebooks/{path.stem}.md": path for path in pages.NOTEBOOKS}
    if page in lessons:
        path = lessons[page]
        links = pages.badges(path, address())
        if path in pages.LESSONS:
            links["Its guide"] = f"../guides/{pages.guide_of(path)}.md"
        remark = (
            "The notebook as it ran; controls move in Colab, in Binder and in `moddiff lab`. "
            f"In Colab, run this first in a cell of its own: `%pip install git+{address()}`"
        )
        return pages.headed(text, links, remark)
    taught = {f"guides/{pages.guide_of(path)}.md": path for path in pages.LESSONS}
    if page in taught:
        return pages.headed(text, {"Its lesson": f"../notebooks/{taught[page].stem}.md"})
    return text


def on_config(config):
    config.nav = navigation()
    # Not as repo_url: the theme would ask GitHub for the stars whenever a page is read.
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": address(), "name": "Source"}]
    return config


def on_files(files, config):
    for name, content in contents().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    known = {file.src_uri for file in files}
    return pages.relinked(pages.spaced(with_buttons(name, markdown)), name, known, address())
