"""Is a film in chunks, with what was kept of earlier ones, the film behind a mask?"""

import re
from copy import deepcopy

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moddiff import capture, patch
from moddiff.attention import attend
from moddiff.experts import Experts
from moddiff.extensions import causal, quantized, windowed
from moddiff.extensions.streaming import chunks
from moddiff.hooks import OneRun, at

FRAMES, TOKENS = 7, 6  # latent frames, and the tokens of each


@pytest.fixture(scope="module")
def dit():
    return small.dit()


@pytest.fixture(scope="module")
def film(dit):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, small.Z, FRAMES, 4, 6, generator=g)
    text = [torch.randn(n, dit.config.text_dim, generator=g) for n in (5, 3)]
    return x, torch.rand(2, FRAMES * TOKENS, generator=g) * 1000, text


def visible(lengths, sink, window):
    """Which frame sees which, by the words of `causal`: its chunk, the sink, the window before its chunk."""
    turn = [i for i, length in enumerate(lengths) for _ in range(length)]
    first = [turn.index(i) for i in turn]
    return [
        [
            turn[key] == turn[query]
            or (key < first[query] and (key < sink or window is None or key >= first[query] - window))
            for key in range(FRAMES)
        ]
        for query in range(FRAMES)
    ]


def masked(dit, film, mask):
    """The oracle: the whole film by the plain model, each attention with that mask as a bias."""
    mask = torch.tensor(mask).repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    other = deepcopy(dit)
    for block in other.blocks:
        block.self_attn.listen = lambda q, k, v: attend(q, k, v, bias=mask, kernel="math")
    return other(*film)


def in_turn(new, film, lengths, twice=False):
    x, t, text = film
    found, first = [], 0
    for length in lengths:
        there = slice(first, first + length), slice(first * TOKENS, (first + length) * TOKENS)
        with at(window=range(first, first + length)):
            if twice:  # another noise level, whose keys the next call replaces
                new(x[:, :, there[0]] + 1, t[:, there[1]], text)
            found.append(new(x[:, :, there[0]], t[:, there[1]], text))
        first += length
    return torch.cat(found, 2)


CHUNKINGS = [[3, 3, 1], [1, 2, 3, 1], [7], [1] * 7, [2, 5], [4, 3]]


@torch.no_grad()
@pytest.mark.parametrize(("sink", "window"), [(0, None), (1, 2), (0, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize("lengths", CHUNKINGS, ids=str)
def test_chunks_in_turn_equal_a_mask_over_the_whole(dit, film, lengths, sink, window):
    new, wanted = causal(dit, lengths, sink, window), masked(dit, film, visible(lengths, sink, window))
    assert (new(*film) - wanted).abs().max() < 1e-6
    for twice in (False, True):
        assert (in_turn(new, film, lengths, twice) - wanted).abs().max() < 1e-6


@torch.no_grad()
@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=7),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_the_identity_holds_for_random_weights_and_chunkings(lengths, sink, window, seed):
    lengths = [end - first for first, end in chunks(FRAMES, lengths)]
    g, one = torch.Generator().manual_seed(seed), small.dit(seed=seed)
    x = torch.randn(1, small.Z, FRAMES, 4, 6, generator=g)
    film = x, torch.full((1, FRAMES * TOKENS), 500.0), [torch.randn(4, 16, generator=g)]
    new = causal(one, lengths, sink, window)
    assert (in_turn(new, film, lengths) - new(*film)).abs().max() < 1e-6


def test_one_chunk_is_the_plain_model_to_the_bit(dit, film):
    with torch.no_grad():
        assert torch.equal(causal(dit, FRAMES)(*film), dit(*film))
        assert not torch.equal(causal(dit, 3)(*film), dit(*film))


@torch.no_grad()
def test_runs_branches_and_copies_keep_their_own(dit, film):
    new, other = causal(dit, [3, 4]), (film[0].flip(0), *film[1:])
    alone = [in_turn(new, one, [3, 4]) for one in (film, other)]
    marks = OneRun(), OneRun()
    halves = [[], []]
    for first, end in ((0, 3), (3, 7)):  # two runs in turn
        for mark, (x, t, text), half in zip(marks, (film, other), halves):
            with at(run=mark, branch="cond", window=range(first, end)):
                half.append(new(x[:, :, first:end], t[:, first * TOKENS : end * TOKENS], text))
    for half, wanted in zip(halves, alone):
        assert torch.equal(torch.cat(half, 2), wanted)
    rows = new.report().rows
    assert rows[-1]["frames kept"] == 7 and rows[-1]["bytes"] == 2 * 2 * 2 * 2 * FRAMES * TOKENS * 16 * 4
    with at(run=marks[0], branch="uncond", window=range(3, 7)), pytest.raises(ValueError, match="not kept"):
        new(film[0][:, :, 3:], film[1][:, 3 * TOKENS :], film[2])
    with at(window=range(3, 7)), pytest.raises(ValueError, match="looks back at frame 0"):
        deepcopy(new)(film[0][:, :, 3:], film[1][:, 3 * TOKENS :], film[2])


@torch.no_grad()
def test_what_a_chunk_sees_is_shown_by_taps(dit, film):
    new, (x, t, text) = causal(dit, 3), film
    plain = in_turn(new, film, [3, 3, 1])
    with capture(new, "blocks.0.self_attn.probs") as seen:
        assert torch.equal(in_turn(new, film, [3, 3, 1]), plain)
    shapes = {where.window: tuple(value.shape[2:]) for where, value in seen}
    assert shapes == {(0, 1, 2): (18, 18), (3, 4, 5): (18, 36), (6,): (6, 42)}
    with capture(new, "blocks.1.self_attn.probs") as seen:
        new(x, t, text)
    probs = next(value for _, value in seen)
    assert (probs[:, :, :18, 18:] == 0).all() and (probs[:, :, 36:, :36] > 0).all()
    with patch(new, "blocks.0.self_attn.k", lambda k, where: k * 2):
        assert not torch.equal(in_turn(new, film, [3, 3, 1]), plain)


@torch.no_grad()
def test_only_the_sink_and_the_window_stay(dit, film):
    new = causal(dit, 1, sink=1, window=2)
    with at(run=OneRun(), branch="cond"):
        in_turn(new, film, [1] * FRAMES)
    assert new.report().rows[-1]["frames kept"] == 4  # the sink, two before, its own


# ---- a film as it comes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


PROMPT = "a red circle moving left on a black background"


@pytest.mark.parametrize("frames", [1, 9, 21])
def test_the_pieces_of_a_plain_run_are_its_film(pipe, frames):
    pieces = list(pipe.stream(PROMPT, seed=2, frames=frames))
    whole = pipe(PROMPT, seed=2, frames=frames)
    assert [len(piece) for piece in pieces] == [1] + [4] * (frames // 4)
    assert np.concatenate([piece.frames for piece in pieces]).shape == whole.frames.shape
    assert (
        np.abs(np.concatenate([p.frames for p in pieces]).astype(int) - whole.frames.astype(int)).max() <= 1
    )
    assert [i for piece in pieces for i in piece.frame_numbers] == list(range(frames))
    assert pieces[0].settings == whole.settings


def test_the_first_frames_come_before_later_ones_are_begun(pipe):
    new = pipe.replace(dit=causal(pipe.dit, chunk=2))
    with capture(new.dit, "patches", branch="cond") as seen:
        film = new.stream(PROMPT, seed=2, frames=21)  # six latent frames
        assert not len(seen)
        first = next(film)
        assert {where.window for where, _ in seen} == {(0, 1)}
        rest = list(film)
    steps = [(where.window[0], where.step) for where, _ in seen]
    # Three steps for each chunk, and one more look at what came of it.
    assert steps == [(first, step) for first in (0, 2, 4) for step in range(4)]
    assert sum(map(len, (first, *rest))) == 21
    again = np.concatenate([piece.frames for piece in new.stream(PROMPT, seed=2, frames=21)])
    assert np.array_equal(np.concatenate([piece.frames for piece in (first, *rest)]), again)


@torch.no_grad()
def test_a_streamed_film_is_the_loop_by_hand(pipe):
    """Each chunk through Euler's steps, with the clean ones before it, by the whole film's mask."""
    new = pipe.replace(dit=causal(pipe.dit, chunk=2))
    run = new.prepare(PROMPT, seed=2, frames=13, solver="euler", scale=1.0, steps=2)
    mask, latent = causal(pipe.dit, chunk=2), run.noise.clone()
    per_frame = latent.shape[3] * latent.shape[4] // 4
    for first in (0, 2):
        times = torch.zeros(1, latent.shape[2] * per_frame)
        for t, sigma, after in run.schedule:
            times[:, first * per_frame : (first + 2) * per_frame] = t
            velocity = mask(latent, times, run.context["cond"])
            latent[:, :, first : first + 2] += (after - sigma) * velocity[:, :, first : first + 2]
    pieces = list(new.stream(PROMPT, seed=2, frames=13, solver="euler", scale=1.0, steps=2))
    wanted = new.decode(latent).frames.astype(int)
    assert np.abs(np.concatenate([piece.frames for piece in pieces]).astype(int) - wanted).max() <= 1


def test_pictures_go_with_their_frames(tmp_path):
    one = small.pipeline(tmp_path, "i2v")
    new = one.replace(dit=causal(one.dit, chunk=1))
    picture = torch.rand(3, *small.SIZE) * 2 - 1
    with capture(new.dit, "patches", branch="cond", steps=0) as seen:
        pieces = list(new.stream(PROMPT, image=picture, seed=0))
    assert sum(map(len, pieces)) == small.FRAMES and len(seen) == 3
    both = new.replace(dit=causal(Experts(small.dit("i2v"), small.dit("i2v", seed=1), 0.9), chunk=2))
    assert sum(len(piece) for piece in both.stream(PROMPT, image=picture, seed=0)) == small.FRAMES


def test_a_break_leaves_nothing_behind(pipe):
    new = pipe.replace(dit=causal(pipe.dit, chunk=1))
    for piece in new.stream(PROMPT, seed=2):
        assert len(piece) == 1
        break
    assert next(new.stream(PROMPT, seed=2)) == piece


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(chunk=0), "causal(chunk=0); expected a whole number of latent frames, from 1 on"),
        (dict(chunk=[]), "expected how many latent frames a chunk has"),
        (dict(chunk=[2, "3"]), "causal(chunk='3')"),
        (dict(sink=-1), "causal(sink=-1)"),
        (dict(window=1.5), "causal(window=1.5)"),
    ],
)
def test_wrong_numbers_are_refused_at_the_call(dit, how, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        causal(dit, **how)


def test_what_cannot_go_in_turn_is_refused_at_the_call(dit):
    with pytest.raises(ValueError, match="in a way of its own"):
        causal(windowed(dit, length=3, overlap=1))
    with pytest.raises(ValueError, match="chunk by chunk"):
        windowed(causal(dit), length=3, overlap=1)
    with pytest.raises(ValueError, match="a dit of ours"):
        causal(lambda x, t, text: x)
    with pytest.raises(ValueError, match="VACE"):
        causal(small.dit("vace"))
    new = causal(quantized(dit, "int8"), 2)
    with at(window=(0, 2)), pytest.raises(ValueError, match="one by one"):
        new(torch.zeros(1, small.Z, 2, 4, 6), torch.zeros(1), [torch.zeros(2, 16)])
