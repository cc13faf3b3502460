"""Does a value know where it is?"""

import pytest
import torch
from toy import message

from moddiff.hooks import OneRun, Where, at, position


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


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (dict(step="3"), "at(step='3'): expected the number of the step"),
        (dict(step=2.7), "at(step=2.7): expected the number of the step"),
        (dict(step=torch.tensor(0.5)), "at(step=tensor(0.5000)): expected the number of the step"),
        (dict(sigma=torch.ones(2)), "at(sigma=tensor([1., 1.])): expected a noise level"),
        (dict(sigma="high"), "at(sigma='high'): expected a noise level"),
        (dict(branch=1), "at(branch=1): expected the branch's name"),
        (dict(expert=0), "at(expert=0): expected the expert's name"),
        (dict(window=3), "at(window=3): expected the latent frames of a window"),
        (dict(window="012"), "at(window='012'): expected the latent frames of a window"),
        (dict(run="first"), "at(run='first'): expected a OneRun"),
    ],
)
def test_what_is_no_place_is_refused(said, text):
    assert text in message(TypeError, lambda: at(**said))


def test_run_expert_and_window_are_coordinates_too():
    run = OneRun()
    with at(run=run, expert="low", window=range(3, 6)):
        assert position() == {"run": run, "expert": "low", "window": (3, 4, 5)}


def test_a_place_is_entered_once_at_a_time():
    place = at(step=torch.tensor(1), sigma=torch.tensor(0.5))
    with place:
        assert position()["step"] == 1
        assert "open already; make a new one" in message(RuntimeError, place.__enter__)
        assert position()["step"] == 1
    with place:
        assert position()["step"] == 1
    assert position() == {}
