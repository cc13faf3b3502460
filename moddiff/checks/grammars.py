"""Does the reader hold a language model to a grammar as the library does?"""

from ..rewrite.local import following
from .verdict import attempted, exercise, expect, first_hint

SLOTS = [["a red", "a r", "a blue"], [" circle", "ed star"], ["!"]]
END = "<end>"
WAYS = (  # what was written so far
    "",
    "a",
    "a r",
    "a red",
    "a blue",
    "a red circle",
    "a red star",
    "a blue circle!",
    "a green",
    "a red star!!",
)


def in_letters(slots):
    return [[list(choice) for choice in choices] for choices in slots]


@exercise("every token that can still become a sentence is allowed, and no other.")
def allowed_tokens(answer):
    """The exercise of 12_rewrite; a token is a letter here.

    answer(slots, done, end) -> the tokens that may follow `done`: a set; {end} once the sentence is whole.
    """
    slots = in_letters(SLOTS)
    for written in WAYS:
        done = list(written)
        got = attempted(answer, in_letters(SLOTS), list(done), END)
        expect(isinstance(got, set), f"got a {type(got).__name__}; expected a set of tokens")
        right = following(slots, done, END)
        greedy = _first_fit(slots, done)
        hints = {
            "one choice may begin another ('a r' and 'a red'): keep both ways open": greedy != right
            and got == greedy,
            "the sentence is whole: now only the end may follow": right == {END} and END not in got,
            "that sentence is dead: no choice begins so, and nothing may follow": not right and bool(got),
            "a token of a later slot came too early, or the end did": bool(got - right),
            "a token that can still become a sentence is missing": bool(right - got),
        }
        expect(got == right, f"after {written!r}: {first_hint(hints, 'another set was expected')}")


def _first_fit(slots, done):
    """What follows for one who takes the first choice that fits, and never looks back."""
    if not slots:
        return {END} if not done else set()
    for choice in slots[0]:
        if len(done) >= len(choice) and done[: len(choice)] == choice:
            return _first_fit(slots[1:], done[len(choice) :])
    return {choice[len(done)] for choice in slots[0] if choice[: len(done)] == done}
