"""The exercise of 19_compile: the right count passes, and usual wrong ones are told their mistake."""

import pytest
from answers import rejected, solution

from moddiff import checks


def count(n, m, c, f, self_products=4, cross_products=2, each=2, attention=4, words=True, prepared=0):
    products = each * n * ((self_products + cross_products) * c**2 + 2 * c * f)
    return products + each * attention // 2 * n * (n + m * words) * c + prepared * 4 * m * c**2


def test_the_count_of_the_solution_is_right():
    assert checks.compile(solution("19_compile", "my_operations")).right is True
    assert checks.compile(count).right is True
    assert checks.compile(lambda *sizes: None).right is None


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        (dict(each=1), "two operations"),
        (dict(attention=0), "two attentions"),
        (dict(attention=2), "the sum of the values"),
        (dict(words=False), "the words too"),
        (dict(prepared=1), "once a prompt"),
        (dict(cross_products=0), "queries and output"),
        (dict(self_products=3), "expected"),
    ],
)
def test_a_wrong_count_is_told_its_mistake(how, hint):
    rejected(checks.compile(lambda *sizes: count(*sizes, **how)), hint)
