"""Does a verdict say what it should?"""

import torch
from answers import rejected

from moddiff import checks
from moddiff.checks.verdict import attempted, exercise, expect, expect_close


def test_what_a_verdict_quotes_cannot_break_the_page():
    verdict = checks.Verdict(False, "it stopped with ValueError: <img src=x onerror=alert(1)> & 'a'")
    page = verdict._repr_html_()
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; 'a'" in page and "<img" not in page
    assert repr(verdict) == f"not yet: {verdict.text}"


@exercise("twice as much")
def doubled(answer):
    result = attempted(answer, torch.tensor([1.0]))
    expect(isinstance(result, torch.Tensor), f"expected a tensor, got {result}")
    mistakes = {"as it was": torch.tensor([1.0]), "too much": (torch.tensor([3.0]), torch.tensor([4.0]))}
    expect_close(result, torch.tensor([2.0]), mistakes, "something else")


def test_the_first_expectation_that_is_not_met_is_the_verdict():
    assert doubled(lambda x: 2 * x) == checks.Verdict(True, "twice as much")
    assert doubled(lambda x: None) is checks.NOT_ATTEMPTED
    rejected(doubled(lambda x: 2.0), "expected a tensor, got 2.0")
    rejected(doubled(lambda x: x), "as it was")
    rejected(doubled(lambda x: 4 * x), "too much")
    rejected(doubled(lambda x: 5 * x), "something else")
    rejected(doubled(lambda x: x.expand(2)), "something else")
    rejected(doubled(lambda x: x * float("nan")), "something else")
    rejected(doubled(lambda x: x / x.missing), "AttributeError")


def test_every_lesson_has_its_checker_by_its_own_name():
    lessons = (
        "pipeline attention hooks text vae flow dit rope solvers guidance image weights tracing training"
    ).split()
    for lesson in lessons:
        assert getattr(checks, lesson)(lambda *arguments: None) is checks.NOT_ATTEMPTED, lesson
