"""The models that come with the package: do they load, run and repeat themselves, and can one look inside?"""

import json
import warnings

import numpy as np
import pytest
import torch
from moddiff.releases import PACKAGE, preset
from safetensors import safe_open

import moddiff
from moddiff import capture, load, patch, taps
from moddiff.hooks import live_handles, transplant, zero
from moddiff.text import clean
from moddiff.tiny import world
from moddiff.tiny.words import LANGUAGES
from moddiff.tracing import recovered, sweep
from moddiff.viz import show_words

PROMPT = "a red circle moves left"
SHORT = dict(steps=2, frames=5)


@pytest.fixture(scope="module")
def pipe():
    return load("tiny")


def test_the_weights_are_small_and_their_configs_are_those_of_the_preset():
    files = list((PACKAGE / "tiny" / "weights").glob("*"))
    assert sum(path.stat().st_size for path in files) <= 80e6
    entry = preset("tiny-t2v")
    for kind in ("dit", "text", "vae"):
        with safe_open(PACKAGE / "tiny" / "weights" / entry["weights"][kind], "pt") as file:
            assert json.loads(file.metadata()["config"]) == entry[kind]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(pipe):
    first, again, other = (pipe(PROMPT, seed=seed, **SHORT).frames for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_defaults_are_those_of_the_tiny_world(pipe):
    video = pipe(PROMPT, seed=0, steps=1)
    assert video.frames.shape == (world.FRAMES, world.SIZE, world.SIZE, 3) and video.fps == world.FPS
    assert pipe.grid == (5, 6, 6) and pipe.defaults["steps"] == 20


def test_unknown_words_give_a_video_and_a_note_that_names_them(pipe):
    with pytest.warns(moddiff.Note, match="dragon"):
        video = pipe("a red dragon moving left", seed=0, **SHORT)
    assert "dragon" in video.notes[0] and len(video) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(PROMPT, seed=0, steps=1)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_words_together_carry_which_motion_is_whose(pipe, language):
    """The same words with two motions swapped: some word's own vector must tell the two apart.

    Cross-attention sees a set of vectors, without an order. Here the motions' own vectors do it.
    """

    def vectors(first, second):
        scene = world.Scene(
            (world.Thing("circle", "red", first), world.Thing("star", "blue", second)), "black"
        )
        text = world.caption(scene, language)
        tokens = pipe.text.tokenizer.model.encode(clean(text)).tokens
        found = {}
        for token, vector in zip(tokens, pipe.text.encode([text])[0][: len(tokens)], strict=True):
            found.setdefault(token, []).append(vector)
        return {token: torch.stack(rows) for token, rows in found.items()}

    for pair in (("growing", "shrinking"), ("moving left", "moving right")):
        x, y = vectors(*pair), vectors(*reversed(pair))
        assert x.keys() == y.keys()
        apart = {
            token: (torch.cdist(rows, y[token]).amin(1) / rows.norm(dim=-1)).max().item()
            for token, rows in x.items()
        }
        assert max(apart.values()) > 0.1, apart


def test_the_background_of_the_prompt_is_the_background_of_the_video(pipe):
    from moddiff.tiny.score import read

    for name in ("black", "gray"):
        video = pipe(f"a yellow square standing still on a {name} background", seed=3, steps=8)
        assert read(video.frames).background == name


def test_the_cells_of_the_hooks_lesson_run_as_they_are_printed(pipe):
    dit = pipe.dit
    assert "blocks.0.self_attn.probs" in str(taps(dit, "blocks.0.*"))
    plain = pipe(PROMPT, seed=0)

    with capture(
        dit, "blocks.*.cross_attn.probs", steps=[0, 5, 10], branch="cond", dtype=torch.float16, device="cpu"
    ) as seen:
        video = pipe("a red circle moves left", seed=0)
    assert video == plain
    probs = seen.stack("cross_attn.probs")  # [block, step, b, heads, n, l]
    assert probs.shape == (8, 3, 1, 4, 180, 64)
    torch.testing.assert_close(probs.float().sum(-1), torch.ones(8, 3, 1, 4, 180), atol=3e-3, rtol=0)
    assert show_words(probs[2, 1, 0], pipe.words("a red circle moves left"), grid=pipe.grid).axes

    def only_the_noun(probs, where):  # [b, heads, n, l]
        keep = torch.zeros_like(probs)
        keep[..., 2] = 1
        return keep

    with patch(dit, "blocks.*.cross_attn.probs", only_the_noun, branch="cond"):
        assert pipe("a red circle moves left", seed=0, steps=2) != pipe.replace()(
            "a red circle moves left", seed=1, steps=2
        )

    with patch(dit, "blocks.2.cross_attn.heads", zero(heads=3)):
        ablated = pipe("a red circle moves left", seed=0)
    assert ablated != plain
    assert pipe(PROMPT, seed=0) == plain and not live_handles()


def test_the_cells_of_the_tracing_lesson_run_as_they_are_printed(pipe):
    dit = pipe.dit
    few = dict(seed=0, steps=3, frames=5)

    def redness(video):
        return float(video.frames[..., 0].astype(float).mean() - video.frames[..., 2].astype(float).mean())

    with capture(dit, "blocks.*.resid_post", branch="cond") as A:
        a = pipe("a red circle moves left", **few)
    b = pipe("a blue square moves left", **few)
    last = max(range(8))
    with (
        patch(dit, f"blocks.{last}.resid_post", transplant(A), branch="cond"),
        patch(dit, "final", lambda x, where: x),
    ):
        mixed = pipe("a blue square moves left", **few)
    assert mixed != b

    def run(block, step):
        with patch(dit, f"blocks.{block}.resid_post", transplant(A), steps=[step], branch="cond"):
            return recovered(
                redness(pipe("a blue square moves left", **few)), low=redness(b), high=redness(a)
            )

    grid = sweep(run, block=range(2), step=range(0, 3, 2), progress=False)
    assert grid.values.shape == (2, 2) and np.isfinite(grid.values).all() and grid.show().axes
