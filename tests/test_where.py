"""Does a value know where it is?"""

from moddiff.places import Where, at, position


def test_where_knows_its_axes_and_its_name():
    where = Where("blocks.2.attn", "probs", "b heads n m", block=2)
    assert str(where) == "blocks.2.attn.probs" and [
        where.axis(a) for a in ("b", "heads", "n", "m", "tokens", "words")
    ] == [0, 1, 2, 3, 2, 3]


def test_places_nest_add_up_and_end():
    with at(step=1, sigma=0.5):
        with at(branch="cond", step=2):
            assert position() == {"step": 2, "sigma": 0.5, "branch": "cond"}
        assert position() == {"step": 1, "sigma": 0.5}
    assert position() == {}
