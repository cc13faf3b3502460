"""Which names does each room offer?  The pages of the API reference, whose text the docstrings are.

Read from the source without importing it. A room that is a folder offers what its front imports or
defines; a folder whose front does neither offers what its files hold.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "moddiff"
FOLDERS = [path.parent for path in PACKAGE.glob("*/__init__.py")]
ROOMS = sorted([*FOLDERS, *(path for path in PACKAGE.glob("*.py") if path.name[0] != "_")])


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def held(path):
    """Public functions and classes that a file holds, in its order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree(path).body if isinstance(node, kinds) and node.name[0] != "_"]


def home(path, name):
    """The file in which a name is defined, that another file has or hands on.

    None: no file of the room defines it.
    """
    if name in held(path):
        return path
    for node in tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            if name in [alias.name for alias in node.names]:
                return home(path.with_name(f"{node.module}.py"), name)
    return None


def offered(room):
    """(name, where it is defined) of each public function and class of a room."""
    here = f"moddiff.{room.stem}"
    if room.suffix:
        return [(name, f"{here}.{name}") for name in held(room)]
    front = [
        (alias.asname or alias.name, f"{here}.{found.stem}.{alias.name}")
        for node in tree(room / "__init__.py").body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
        if (found := home(room / f"{node.module}.py", alias.name))
    ]
    front += [(name, f"{here}.{name}") for name in held(room / "__init__.py")]
    files = [path for path in sorted(room.glob("*.py")) if path.name[0] != "_"]
    inside = [(f"{path.stem}.{name}", f"{here}.{path.stem}.{name}") for path in files for name in held(path)]
    return front or inside


def front_names():
    """{name: room} of what `moddiff` itself offers."""
    body = tree(PACKAGE / "__init__.py").body
    named = [node for node in body if isinstance(node, ast.Assign) and node.targets[0].id == "_NAMES"]
    return ast.literal_eval(named[0].value)


def question(room):
    """The first paragraph of a room's docstring, and the rest as it stands."""
    text = ast.get_docstring(tree(room if room.suffix else room / "__init__.py"))
    first, _, rest = text.partition("\n\n")
    return first.replace("\n", " "), rest


def room_page(room):
    first, rest = question(room)
    parts = [f"# moddiff.{room.stem}", first]
    if rest:
        parts.append(f"```text\n{rest}\n```")
    for name, path in offered(room):
        parts.append(
            f"::: {path}\n    options:\n      heading: moddiff.{room.stem}.{name}\n      toc_label: {name}"
        )
    return "\n\n".join(parts) + "\n"


def first_page():
    """What `import moddiff` gives, and the rooms."""
    rows = ["# API reference", "What `import moddiff` offers:", "| name | from |\n|---|---|"]
    for name, room in front_names().items():
        # A room hands on what another defines: `moddiff.Note` comes by way of pipeline from settings.
        nearest = sorted(ROOMS, key=lambda path: path.stem != room)
        path = next(names[name] for names in map(dict, map(offered, nearest)) if name in names)
        rows[-1] += f"\n| [`moddiff.{name}`][{path}] | [moddiff.{room}]({room}.md) |"
    rows += ["And the rooms:", "| room | its question |\n|---|---|"]
    for room in ROOMS:
        rows[-1] += f"\n| [{room.stem}]({room.stem}.md) | {question(room)[0].replace('|', '&#124;')} |"
    return "\n\n".join(rows) + "\n"


def api_pages():
    """{page: text} of the whole reference."""
    return {"api/index.md": first_page()} | {f"api/{room.stem}.md": room_page(room) for room in ROOMS}
