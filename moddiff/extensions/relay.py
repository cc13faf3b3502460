"""How does one clip tell one thing after another?  Each segment's words are heard in its frames alone.

A patch that became a method. Lesson 20 writes it in a cell; with `patch` it needs nothing of the model:

    words = pipe.words("a red circle, a blue circle moving right on a black background")
    columns = tokens_of_words(words[:3]), tokens_of_words(words[3:6])
    with patch(pipe.dit, "blocks.*.cross_attn.scores", relay(columns, frames=5, eps=0.2), branch="cond"):
        pipe("a red circle, a blue circle moving right on a black background")

Source: Prompt Relay, arXiv 2604.10030
"""

import math
import operator

import torch


def relay(columns, frames, eps=1e-3, strength=1.0):
    """An edit of the scores of cross-attention, for `patch`.   -> (scores, where) -> scores

    columns   for each segment, in turn, the tokens of its words; other words are heard in all frames
    frames    latent frames of the clip; the segments share them evenly
    eps       how little is left of a word a frame away from its segment; 0.001 is almost a wall, which suits
              clips of many frames
    strength  how much of it all counts; 0: nothing

    From the score of a word of segment s at frame f is taken max(|f - middle of s| - w, 0)^2 / (2 sigma^2),
    with w = max(length of s / 2 - 2, 0) and sigma = 1 / ln(1 / eps).

    Raises ValueError for no segments, more of them than frames, and an eps that is not between 0 and 1.
    """
    columns = [[operator.index(token) for token in tokens] for tokens in columns]
    if not columns or not all(columns) or len(columns) > frames:
        raise ValueError(
            f"relay(columns={columns}, frames={frames}); expected tokens for 1 to {frames} segments"
        )
    if not 0 < eps < 1:
        raise ValueError(f"relay(eps={eps}); expected a share between 0 and 1, such as 0.001")
    taken = distances(len(columns), frames) ** 2 / (2 / math.log(1 / eps) ** 2)  # [segments, frames]

    def edit(scores, where):  # [b, heads, n, words]
        tokens = scores.shape[2]
        if tokens % frames or max(map(max, columns)) >= scores.shape[3]:
            raise ValueError(
                f"{where} has {tokens} tokens of video and {scores.shape[3]} of text; expected a multiple of "
                f"{frames} frames, and tokens of text up to number {max(map(max, columns))}"
            )
        scores = scores.clone()
        for row, words in zip(taken.to(scores), columns):
            scores[..., words] -= strength * row.repeat_interleave(tokens // frames)[:, None]
        return scores

    return edit


def distances(segments, frames):
    """How far each frame is outside of each segment's middle part.   -> [segments, frames]"""
    length = frames / segments
    middles = (torch.arange(segments) + 0.5) * length - 0.5
    away = (torch.arange(frames) - middles[:, None]).abs()
    return (away - max(length / 2 - 2, 0)).clamp(min=0)


def tokens_of_words(words):
    """The tokens of some of `pipe.words(prompt)`, in one list."""
    return [token for word in words for token in word.tokens]
