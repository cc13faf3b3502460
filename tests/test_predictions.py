"""Does a prediction stay closed until there is a guess, and do the letters give nothing away?"""

import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from answers import rejected

from moddiff import checks
from moddiff.checks.predictions import answers

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb"))


def test_a_prediction_stays_closed_until_there_is_a_guess():
    closed = checks.reveal("07.2", None)
    assert closed.right is None and not any(
        why in closed.text for letter, why in answers()["07.2"].items() if letter != "right"
    )


@pytest.mark.parametrize("name", answers())
def test_every_guess_is_explained_and_one_is_right(name):
    why = dict(answers()[name])
    right = why.pop("right")
    for letter, sentence in why.items():
        opened = checks.reveal(name, letter)
        assert opened.right is (letter == right) and opened.text.startswith(sentence)
        assert all(f"({other}) {text}" in opened.text for other, text in why.items() if other != letter)
    rejected(checks.reveal(name, "z"), "'z' is not an option")


def test_a_prediction_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="no prediction '07.9'; there are 01.1, "):
        checks.reveal("07.9", "a")


def test_the_letters_are_spread():
    for count, low, high in ((3, 0.25, 0.42), (4, 0.20, 0.30)):
        asked = [why["right"] for why in answers().values() if len(why) == count + 1]
        letters = Counter(asked)
        for letter in "abcd"[:count] if asked else "":
            assert low <= letters[letter] / len(asked) <= high, f"{count} options: {letters}"


def test_no_lesson_has_one_letter_for_all():
    lessons = {name[:2] for name in answers()}
    for lesson in lessons:
        assert len({why["right"] for name, why in answers().items() if name[:2] == lesson}) > 1, lesson


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_lesson_asks_what_the_library_answers_and_does_not_say_it(path):
    cells = nbformat.read(path, as_version=4).cells
    sources = "\n\n".join(cell.source for cell in cells)
    asked = re.findall(r'checks\.reveal\("([\d.]+)", \w+\)', sources)
    mine = {name: why for name, why in answers().items() if name[:2] == path.stem[:2]}
    assert asked == list(mine), "each prediction once, in order"
    for name, why in mine.items():
        for letter in set(why) - {"right"}:
            assert why[letter] not in sources, f"{name} ({letter}) is explained on the page"
        assert not re.search(r"right *=", sources)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_options_on_the_page_are_those_that_are_answered(path):
    """A line for each option: - **a**: so and so."""
    options, letters = [], {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            options = re.findall(r"(?m)^- \*\*([a-d])\*\*: ", cell.source) or options
        elif found := re.search(r'checks\.reveal\("([\d.]+)"', cell.source):
            letters[found[1]], options = options, []
    for name, shown in letters.items():
        assert shown == sorted(set(answers()[name]) - {"right"}), name
