"""How does a docstring read on a page?  Its aligned columns of names and meanings become tables."""

import html
import re

import griffe

ROW = re.compile(r"(\S.{0,29}?(?<![.;,])) {2,}(\S.*)")


def tabled(paragraph):
    """A paragraph whose lines are `name   meaning`, as a table; any other as it was."""
    lines = paragraph.splitlines()
    if not any(map(ROW.fullmatch, lines)):
        return paragraph
    blocks, rows = [], []  # text before and between the tables; the rows of the table that goes on
    for line in lines:
        if found := ROW.fullmatch(line):
            rows.append(list(found.groups()))
        elif rows and line.startswith(" "):
            rows[-1][1] += " " + line.strip()
        else:
            blocks += [as_table(rows), line] if rows else [line]
            rows = []
    return "\n\n".join(filter(None, (*blocks, as_table(rows))))


def without_references(paragraph):
    """The paragraph with `table[language][n]`, typed without quotes, as an index and not as a link."""
    pieces = re.split(r"(`[^`]*`)", paragraph)
    return "".join(piece if i % 2 else piece.replace("][", "]\\[") for i, piece in enumerate(pieces))


def as_table(rows):
    written = ""
    for name, meaning in rows:
        meaning = re.sub(
            r"`([^`]+)`", r"<code>\1</code>", html.escape(" ".join(meaning.split()), quote=False)
        )
        written += f"<tr><td><code>{html.escape(name)}</code></td><td>{meaning}</td></tr>"
    return f"<table>{written}</table>" if rows else ""


class Columns(griffe.Extension):
    """Told by griffe of each thing that it has read."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            paragraphs = [without_references(tabled(text)) for text in obj.docstring.value.split("\n\n")]
            obj.docstring.value = "\n\n".join(paragraphs)
