"""Do a stranger's words come into a message short, and with nothing that a terminal would obey?"""

import pytest

from moddiff.weights.quoting import first_line, listed, nearest, quoted


def test_an_ordinary_name_is_left_alone():
    assert quoted("blocks.0.self_attn.q.weight") == "blocks.0.self_attn.q.weight"


@pytest.mark.parametrize("name", ["\x1b[2J", "a\x9bb", "a\nb", "a\rb", "‮abc"])
def test_nothing_reaches_the_terminal_that_it_would_obey(name):
    assert quoted(name).isprintable()
    assert listed([name, name]).isprintable()
    assert first_line(ValueError(f"{name}x")).isprintable()


@pytest.mark.parametrize(
    "value", ["x" * 10**6, 10**30, 10**5000, [[1] * 1000] * 1000, {"a": "b" * 10**6}], ids=range(5)
)
def test_no_value_takes_more_than_a_line(value):
    assert len(quoted(value)) < 250


def test_of_many_items_the_first_few_are_shown():
    assert listed("abc") == "a, b, c"
    assert listed(map(str, range(3000)), most=2) == "0, 1, and 2998 more"


def test_an_error_without_words_gives_its_type():
    assert first_line(EOFError()) == "EOFError" and first_line(ValueError("a\nb")) == "a"


def test_the_nearest_known_name_is_offered_and_a_huge_one_costs_nothing():
    assert nearest("num_head", ("dim", "num_heads")) == " (did you mean 'num_heads'?)"
    assert (
        nearest("tea_cache", ("dim", "num_heads")) == nearest("a" * 10**8, ("dim",)) == nearest(5, ()) == ""
    )
