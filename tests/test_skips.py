"""The exercise of 18_cache: the right one passes, and usual wrong ones are told their mistake."""

from functools import partial

import pytest
from answers import rejected, solution

from moddiff import checks
from moddiff.checks.skips import by_rule, one_by_one


def test_the_rule_of_the_solution_is_right():
    assert checks.cache(solution("18_cache", "my_skips")).right is True
    assert checks.cache(by_rule).right is True
    assert checks.cache(lambda changes, threshold: None).right is None


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (
            lambda changes, threshold: [not skips for skips in by_rule(changes, threshold)],
            "which are skipped",
        ),
        (partial(by_rule, first=False), "nothing to reuse"),
        (partial(by_rule, last=False), "the last step is computed always"),
        (partial(by_rule, reset=False), "sets it to zero"),
        (one_by_one, "a large one"),
        (partial(by_rule, late=True), "add first"),
        (partial(by_rule, over=True), "not above"),
        (lambda changes, threshold: changes[1:], "one for each step"),
        (lambda changes, threshold: 3, "got int"),
        (lambda changes, threshold: [False] * len(changes), "for [0.0"),
    ],
)
def test_a_wrong_rule_is_told_its_mistake(wrong, hint):
    rejected(checks.cache(wrong), hint)
