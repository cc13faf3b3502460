"""Is a word heard in its segment alone, by the formula, and does the clip follow?"""

import math
import re

import pytest
import torch

import moddiff
from moddiff import capture, patch
from moddiff.extensions.relay import relay, tokens_of_words

PROMPT = "a red circle, a blue circle moving right on a black background"


@pytest.mark.parametrize(
    ("frames", "segments", "eps"), [(5, 2, 0.2), (21, 3, 1e-3), (12, 1, 0.01), (4, 4, 0.5)]
)
def test_what_is_taken_is_the_formula(frames, segments, eps):
    per_frame, columns = 3, [[2 * s, 2 * s + 1] for s in range(segments)]
    scores = torch.randn(2, 2, frames * per_frame, 2 * segments + 3)
    found = relay(columns, frames, eps, strength=0.5)(scores, None)
    length, sigma = frames / segments, 1 / math.log(1 / eps)
    for row in range(frames * per_frame):
        for column in range(2 * segments + 3):
            taken = 0.0
            if column // 2 < segments:
                middle = (column // 2) * length + (length - 1) / 2
                outside = max(abs(row // per_frame - middle) - max(length / 2 - 2, 0), 0)
                taken = 0.5 * outside**2 / (2 * sigma**2)
            torch.testing.assert_close(found[:, :, row, column], scores[:, :, row, column] - taken)


def test_one_frame_outside_costs_what_the_paper_says():
    """With eps = 0.001 sigma is 0.145, so one frame outside is exp(-24): nearly a wall."""
    taken = -relay([[0], [1]], 42)(torch.zeros(1, 1, 42, 2), None)[0, 0, :, 0]
    # Free is 21 / 2 - 2 to both sides of frame 10.
    assert (taken[2:19] == 0).all() and taken[0] == taken[20]
    assert float(taken[20]) == pytest.approx(1.5**2 * 23.86, rel=0.001)


def test_the_trained_model_goes_from_red_to_blue_in_one_clip():
    pipe = moddiff.load("tiny")
    words = pipe.words(PROMPT)
    columns = tokens_of_words(words[:3]), tokens_of_words(words[3:6])
    with patch(pipe.dit, "blocks.*.cross_attn.scores", relay(columns, 5, eps=0.2), branch="cond"):
        with capture(pipe.dit, "blocks.4.cross_attn.probs", branch="cond", steps=3) as seen:
            film = pipe(PROMPT, seed=0)
    probs = next(value for _, value in seen)[0].mean(0).unflatten(0, (5, -1)).mean(1)  # [frame, token]
    red, blue = (probs[:, tokens].sum(1) for tokens in columns)
    assert red[:2].min() > 3 * red[2:].max() and blue[3:].min() > 3 * blue[:3].max()
    first, last = (film.frames[i].reshape(-1, 3).astype(int) for i in (0, -1))
    assert first[:, 0].max() > 150 and last[:, 2].max() > 150
    redder = [(frame[:, 0] - frame[:, 2]).max() for frame in (first, last)]
    assert redder[0] > 100 > redder[1]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(columns=[], frames=5), "expected tokens for 1 to 5 segments"),
        (dict(columns=[[0], []], frames=5), "expected tokens for 1 to 5 segments"),
        (dict(columns=[[0], [1]], frames=1), "expected tokens for 1 to 1 segments"),
        (dict(columns=[[0]], frames=5, eps=1), "expected a share between 0 and 1"),
    ],
)
def test_wrong_segments_are_refused(how, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        relay(**how)


def test_scores_of_another_clip_are_refused():
    with pytest.raises(ValueError, match="7 tokens of video and 2 of text"):
        relay([[0]], 5)(torch.zeros(1, 1, 7, 2), "blocks.0.cross_attn.scores")
