"""What is said of an answer?  A Verdict, which displays as a sentence, and how a checker comes to one.

A checker is a list of expectations. The first that is not met ends it, and its sentence is the verdict; an
answer that meets them all is right.
"""

from dataclasses import dataclass
from functools import wraps
from html import escape

import torch


@dataclass(frozen=True)
class Verdict:
    """What a checker has to say.

    right  True, False, or None where nothing was attempted
    text   the sentence to show
    """

    right: bool | None
    text: str

    def __repr__(self):
        return {True: "right: ", False: "not yet: ", None: ""}[self.right] + self.text

    def _repr_html_(self):
        colour = {True: "#2a7d4f", False: "#b3541e", None: "#777777"}[self.right]
        # The sentence may quote the reader's own answer or error, whatever that has in it.
        sentence = escape(repr(self), quote=False)
        return f'<p style="border-left: 4px solid {colour}; padding-left: 0.7em">{sentence}</p>'


NOT_ATTEMPTED = Verdict(None, "not attempted: write the function above, run its cell, then this one")


class Ended(Exception):
    """The check is over before its end; the one argument is the Verdict, which `exercise` returns."""


def exercise(praise):
    """A decorator that makes a checker of expectations about the reader's `answer`.

    praise  the sentence for an answer that meets them all
    """

    def decorate(expectations):
        @wraps(expectations)
        def checker(answer):
            try:
                expectations(answer)
            except Ended as end:
                return end.args[0]
            return Verdict(True, praise)

        return checker

    return decorate


def attempted(function, *arguments):
    """What the reader's function returns; if it returns nothing or stops with an error, the check ends."""
    try:
        result = function(*arguments)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        NameError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise Ended(Verdict(False, f"it stopped with {type(error).__name__}: {error}")) from error
    if result is None:
        raise Ended(NOT_ATTEMPTED)
    return result


def expect(met, sentence):
    """Go on if `met`; else the check ends with this sentence."""
    if not met:
        raise Ended(Verdict(False, sentence))


def expect_close(result, right, mistakes, otherwise, tolerance=1e-5):
    """Go on if `result` is `right`; else the check ends with the hint of the mistake that was made.

    mistakes   {hint: the tensor that this mistake leads to, or a tuple of several}
    otherwise  the sentence for a result that is none of them
    """
    seen = {
        hint: any(
            close(result, each, tolerance) for each in (wrong if isinstance(wrong, tuple) else (wrong,))
        )
        for hint, wrong in mistakes.items()
    }
    expect(close(result, right, tolerance), first_hint(seen, otherwise))


def first_hint(mistakes, otherwise):
    """The first hint whose mistake is seen, or `otherwise`.   mistakes: {hint: is it seen}"""
    return next((hint for hint, seen in mistakes.items() if seen), otherwise)


def close(result, expected, tolerance=1e-5):
    """True where two tensors have one shape and differ by no more than `tolerance` anywhere."""
    same_shape = isinstance(result, torch.Tensor) and result.shape == expected.shape
    return same_shape and bool((result - expected).abs().max() <= tolerance)


def shape_of(result):
    """How a result is described in a verdict: a tensor's shape, or a type."""
    return list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
