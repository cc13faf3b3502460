"""Are the notebooks as a reader needs them?  Short cells, prose, outputs, guesses open, solutions right.

Their form only, without a kernel: that they run and print what is committed, pytest checks cell by cell
(nbval, see pyproject.toml).
"""

import ast
import json
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in PATHS if path.stem[:2].isdigit()]
EXAMPLES = [path for path in PATHS if path not in LESSONS]
WIDGET = "application/vnd.jupyter.widget-view+json"


def stem(path):
    return path.stem


class Notebook:
    """A notebook file, taken apart: its cells' sources, outputs, and the text in them."""

    def __init__(self, path):
        self.path, self.size = path, path.stat().st_size
        self.json = json.loads(path.read_text(encoding="utf-8"))
        self.cells = self.json["cells"]
        for cell in self.cells:
            cell["source"] = "".join(cell["source"])
        self.code = [cell for cell in self.cells if cell["cell_type"] == "code"]
        self.prose = [cell["source"] for cell in self.cells if cell["cell_type"] == "markdown"]
        self.sources = [cell["source"] for cell in self.code]
        self.outputs = [output for cell in self.code for output in cell["outputs"]]

    def kinds(self, cell):
        """Which mime types a cell shows."""
        return {kind for output in cell["outputs"] for kind in output.get("data", {})}

    def texts(self):
        """All text that a reader may see in outputs, embedded pictures and videos left out."""
        for output in self.outputs:
            parts = [
                output.get("text", ""),
                *(value for kind, value in output.get("data", {}).items() if kind.startswith("text/")),
            ]
            for part in parts:
                yield re.sub(r"data:[a-z0-9/+.-]+;base64,[A-Za-z0-9+/=]+", "", "".join(part))

    def namespace(self):
        """What a solution may use: the notebook's imports. No cell is run."""
        space = {"__name__": self.path.stem}
        nodes = [
            node
            for source in self.sources
            for node in plain(source).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        exec(compile(ast.Module(nodes, []), str(self.path), "exec"), space)
        return space

    def exercises(self):
        """(name of the checker, name of the function) of each `checks.attention(my_attention)`."""
        calls = [
            found for source in self.sources for found in re.findall(r"(?m)^checks\.(\w+)\((\w+)\)", source)
        ]
        return [call for call in calls if call[0] != "reveal"]

    def stub(self, name):
        return next(source for source in self.sources if f"def {name}(" in source)

    def solutions(self):
        """The ```python block of each folded solution."""
        return re.findall(
            r"(?s)<details>\s*<summary>Solution.*?</summary>.*?```python\n(.*?)```.*?</details>",
            "\n\n".join(self.prose),
        )


def plain(source):
    """A cell's syntax tree, magics and shell lines left out."""
    return ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source))


@pytest.fixture(scope="module", params=PATHS, ids=stem)
def book(request):
    return Notebook(request.param)


@pytest.fixture(scope="module", params=LESSONS, ids=stem)
def lesson(request):
    return Notebook(request.param)


# ---- form ----------------------------------------------------------------------------------------------


def test_there_are_notebooks_to_measure():
    assert LESSONS and EXAMPLES


def test_cells_are_short_and_prose_is_at_least_as_much_as_code(book):
    lines = [len(source.splitlines()) for source in book.sources]
    assert median(lines) <= 6 and max(lines) <= 25
    assert len(book.prose) >= len(book.code) or book.path in EXAMPLES
    assert min(lines) > 0, "an empty code cell"


def test_a_lesson_has_the_parts_that_every_lesson_has(lesson):
    assert 20 <= len(lesson.code) <= 45
    assert "?" in lesson.prose[0], "the first cell asks no question"
    titles = "\n".join(re.findall(r"(?m)^##+ (.*)$", "\n".join(lesson.prose))).lower()
    for part in (
        "see it work",
        "build it small",
        "read the real one",
        "what if",
        "break it",
        "exercise",
        "full size",
        "say it back",
    ):
        assert part in titles, f"{lesson.path.name} has no part {part!r}"
    assert "\n".join(lesson.prose).count("<details>") >= 3, "a hint, a solution and folded answers"


def test_the_notebook_was_run_from_top_to_bottom_and_shows_what_came_out(book):
    assert [cell["execution_count"] for cell in book.code] == list(range(1, len(book.code) + 1))
    assert not [output for output in book.outputs if output["output_type"] == "error"]
    assert not ["".join(output["text"]) for output in book.outputs if output.get("name") == "stderr"]


def test_every_lesson_has_figures_and_a_control_that_shows_a_picture_without_a_kernel(lesson):
    figures = [cell for cell in lesson.code if "image/png" in lesson.kinds(cell)]
    assert len(figures) >= 3
    controls = [lesson.kinds(cell) for cell in lesson.code if WIDGET in lesson.kinds(cell)]
    assert controls, "no live control"
    assert all({"image/png", "text/html"} & kinds for kinds in controls), "a control without a still picture"


def test_every_example_shows_something():
    for path in EXAMPLES:
        shown = set().union(*map((book := Notebook(path)).kinds, book.code))
        assert {"image/png", "text/html"} & shown, path.name


def test_figures_come_from_viz_and_not_from_plotting_code_in_the_cell(book):
    assert not [source for source in book.sources if re.search(r"matplotlib|\bplt\.|\.subplots\(", source)]


def test_a_notebook_is_small_and_named_for_the_plain_kernel(book):
    assert book.size <= 1.5 * 2**20
    assert book.json["metadata"]["kernelspec"]["name"] == "python3"


def test_no_output_or_cell_tells_where_it_was_run(book):
    private = re.compile(
        r"/(work|tmp|home|root|Users|usr|opt|mnt)/\w|site-packages|\b0x[0-9a-f]{8,}|ipykernel_\d+"
    )
    for text in [*book.texts(), *book.sources, *book.prose]:
        assert not (found := private.search(text)), text[max(0, found.start() - 60) : found.end() + 60]


def test_links_lead_to_files_of_the_repository_or_to_papers_and_sources(book):
    text = re.sub(r"(?ms)^```.*?^```$|`[^`\n]*`", "", "\n\n".join(book.prose))
    hosts = re.findall(r"https?://([^/\s)>]+)", text)
    assert not [host for host in hosts if host not in ("arxiv.org", "github.com", "doi.org")]
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (book.path.parent / target).exists(), f"{book.path.name} links to {target}, which is not there"


def test_a_lesson_ends_with_its_guide_and_the_next_notebook(lesson):
    assert re.search(r"\]\(\.\./guides/\w+\.md", lesson.prose[-1] + lesson.prose[-2])
    if lesson.path != LESSONS[-1]:
        assert re.search(r"\]\(\w+\.ipynb", lesson.prose[-1] + lesson.prose[-2])


def test_the_title_is_a_number_a_name_and_a_question(book):
    """So that a list of titles, on the site or in an editor, reads as one list."""
    number = book.path.stem[:2] if book.path in LESSONS else "Examples"
    assert re.match(rf"# {number} · [A-Z][^\n?]+\n\n\*[A-Z][^\n*]+\?\*\n\n", book.prose[0]), book.prose[0][
        :120
    ]


# ---- predictions and exercises -------------------------------------------------------------------------


def test_three_predictions_wait_for_a_guess(lesson):
    guesses = [
        found for source in lesson.sources for found in re.findall(r"(?m)^guess\w* *= *([^#\n]*)", source)
    ]
    assert len(guesses) >= 3 and {guess.strip() for guess in guesses} == {"None"}
    reveals = [cell for cell in lesson.code if "checks.reveal(" in cell["source"]]
    assert len(reveals) == len(guesses)
    for cell in reveals:
        assert "commit to a guess first" in json.dumps(cell["outputs"]), "as shipped, a reveal stays closed"


def test_every_folded_solution_is_right_and_the_untouched_stub_is_not_attempted(lesson):
    from moddiff import checks

    exercises, solutions = lesson.exercises(), lesson.solutions()
    assert exercises, "no exercise with a checker"
    for checker, name in exercises:
        check, space = getattr(checks, checker), lesson.namespace()
        exec(lesson.stub(name), space)
        assert check(space[name]).right is None, f"the stub {name} is not reported as not attempted"
        solved = [solution for solution in solutions if f"def {name}(" in solution]
        assert solved, f"no folded solution defines {name}"
        for solution in solved:
            exec(solution, space)
            verdict = check(space[name])
            assert verdict.right is True, f"checks.{checker} of the solution: {verdict!r}"


# ---- the measures themselves ---------------------------------------------------------------------------


def test_a_folded_solution_is_found_whole():
    book = object.__new__(Notebook)
    hint = "<details><summary>Hint</summary>\nthink\n</details>"
    code = "```python\ndef f(x):\n    return x\n```"
    book.prose = [f"{hint}\n\n<details><summary>Solution</summary>\n\n{code}\n\n</details>"]
    assert book.solutions() == ["def f(x):\n    return x\n"]


def test_the_sanitize_file_hides_what_may_differ_and_nothing_else():
    rules = re.findall(
        r"(?m)^regex: (.*)$\n^replace: (.*)$", (ROOT / "tests" / "nbval.cfg").read_text(encoding="utf-8")
    )

    def clean(text):
        for regex, replace in rules:
            text = re.sub(regex, replace, text)
        return text

    for one, other in (
        ("error 0.123456 of 2.3e-07", "error 0.123459 of 9.1e-06"),
        ("src='data:video/mp4;base64,AAA/+=' x", "src='data:video/mp4;base64,BBBB' x"),
        ("<f at 0x7f00aa>", "<f at 0x7f11bb>"),
        ("made in 2.5 s", "made in 1.9 s"),
        ("40% of the time", "9% of the time"),
        ("/a/ipykernel_12/34.py:1", "/b/ipykernel_9/5.py:1"),
        ("<Figure size 560x190 with 1 Axes>", "<Figure size 561x190 with 1 Axes>"),
    ):
        assert clean(one) == clean(other)
    for one, other in (
        ("shift 3.0", "shift 5.0"),
        ("[2, 4, 180, 48]", "[2, 4, 180, 64]"),
        ("0.12 s", "0.13 s"),
        ("40% of them", "41% of them"),
        ("right: yes", "not yet: no"),
        ("1e-3", "2e-3"),
    ):
        assert clean(one) != clean(other)
