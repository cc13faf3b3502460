"""Is every figure there, listed, small enough for a notebook, and free until it is drawn?"""

import subprocess
import sys

import numpy as np
import torch

from moddiff import viz
from moddiff.pipeline import Word
from moddiff.video import Video


def test_every_figure_is_listed_in_the_table_of_contents():
    for name in set(viz.__all__) - {"Live", "Tree", "figure", "dress", "png"}:
        assert callable(getattr(viz, name)) and name in viz.__doc__ and getattr(viz, name).__doc__


def test_nothing_that_draws_is_imported_before_the_first_drawing():
    code = "import sys, moddiff.viz; print([name for name in ('matplotlib', 'ipywidgets', 'IPython') if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_the_figures_of_a_tiny_run_are_small_files():
    """As a notebook makes them: 17 frames of 96 x 96, 180 tokens, 4 heads, 8 blocks, a prompt of ten words."""
    rows, columns = np.mgrid[:96, :96]
    frames = np.stack(
        [
            np.where(
                ((rows - 48) ** 2 + (columns - 70 + 2 * i) ** 2 < 150)[..., None], (230, 40, 40), (12, 20, 76)
            )
            for i in range(17)
        ]
    )
    video, grid = Video(frames.astype(np.uint8), 8), (5, 6, 6)
    near = np.stack(
        [
            np.exp(-(((rows - 48) ** 2 + (columns - 70 + 2 * i) ** 2) / 400))[8::16, 8::16]
            for i in (0, 2, 6, 10, 14)
        ]
    )
    logits = np.random.default_rng(0).normal(0, 0.1, (4, 180, 64)) + near.reshape(-1, 1) * np.linspace(
        0, 3, 64
    )
    probs = torch.tensor(logits).softmax(-1)
    words = [Word(f"word{i}", (i,)) for i in range(10)]
    drawn = [
        viz.show_words(probs, words[:5], grid, video),
        viz.attention_rows(probs[:, :, :1].expand(-1, -1, 180) / 180, grid, (2, 3, 1), video),
        viz.latent_sheet(torch.randn(16, 5, 12, 12)),
        viz.head_grid(np.random.default_rng(0).random((8, 4, 6, 6))),
    ]
    sizes = [len(viz.png(one)) for one in drawn]
    assert max(sizes) < 60_000, sizes
    played = viz.word_animation(probs, words[1:3], grid, video)
    assert len(played) == 17 and len(played._repr_html_()) < 120_000
