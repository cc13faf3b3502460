"""The exercise of 12_rewrite: the right one passes, and usual wrong ones are told their mistake."""

import pytest
from answers import rejected, solution

from moddiff import checks
from moddiff.checks.grammars import END, SLOTS, _first_fit, in_letters
from moddiff.rewrite.local import following


def test_the_solution_and_the_library_are_right_and_an_empty_function_is_not_attempted():
    assert checks.rewrite(solution("12_rewrite", "my_allowed")).right is True
    assert checks.rewrite(following).right is True
    assert checks.rewrite(lambda slots, done, end: None).right is None


def without_end(slots, done, end):
    return following(slots, done, end) - {end}


def anything(slots, done, end):
    return {choice[0] for choices in slots for choice in choices}


def never_dead(slots, done, end):
    return following(slots, done, end) or {end}


def too_few(slots, done, end):
    return set(sorted(following(slots, done, end))[:1])


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda slots, done, end: _first_fit(slots, done), "keep both ways open"),
        (without_end, "the sentence is whole"),
        (anything, "too early"),
        (never_dead, "that sentence is dead"),
        (too_few, "is missing"),
        (lambda slots, done, end: list(following(slots, done, end)), "got a list"),
        (lambda slots, done, end: slots[9], "IndexError"),
    ],
)
def test_a_wrong_set_is_told_its_mistake(wrong, hint):
    rejected(checks.rewrite(wrong), hint)


def test_the_grammar_has_the_trap_that_it_is_for():
    slots, done = in_letters(SLOTS), list("a red star")
    assert _first_fit(slots, done) != following(slots, done, END)
