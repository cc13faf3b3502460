"""Was my prediction right, and why?  The answers to every lesson's predictions, opened by a guess.

The answers lie beside this file, `answers/07_dit.json` for the lesson 07_dit:

    {"07.2": {"right": "c", "a": "why not", "b": "why not", "c": "why"}}
"""

import json
from functools import cache
from importlib.resources import files

from .verdict import Verdict


@cache
def answers():
    """All predictions of all lessons.   -> {"07.2": {"right": a letter, letter: a sentence}}"""
    folder = files(__package__) / "answers"
    lessons = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {name: each for f in lessons for name, each in json.loads(f.read_text("utf-8")).items()}


def reveal(prediction, guess):
    """Open a prediction: why the guessed option is right or wrong, and only then the others.   -> Verdict

    prediction  its lesson and number, such as "07.2"
    guess       None (nothing is given away), or the letter of an option

    Raises ValueError for a prediction that there is not.
    """
    if prediction not in answers():
        raise ValueError(f"no prediction {prediction!r}; there are {', '.join(answers())}")
    why = dict(answers()[prediction])
    right = why.pop("right")
    letters = ", ".join(map(repr, why))
    if guess is None:
        return Verdict(
            None, f"commit to a guess first: set guess to one of {letters} and run both cells again"
        )
    if guess not in why:
        return Verdict(False, f"{guess!r} is not an option; choose one of {letters}")
    others = " ".join(f"({letter}) {text}" for letter, text in why.items() if letter != guess)
    return Verdict(guess == right, f"{why[guess]} And the other answers: {others}")
