"""Is every figure there, listed, small enough for a notebook, and free until it is drawn?"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from moddiff import viz
from moddiff.pipeline import Word
from moddiff.tracing import Sweep
from moddiff.video import Video


def test_every_figure_is_listed_in_the_table_of_contents():
    own = {
        name
        for name, thing in vars(viz).items()
        if getattr(thing, "__module__", "").startswith("moddiff.viz.")
    }
    assert len(own) > 35
    for name in own - {"Live", "Tree"}:
        assert callable(getattr(viz, name)) and name in viz.__doc__ and getattr(viz, name).__doc__


WILD = "$a_{$ {b}"  # as a formula it would be an error


@pytest.mark.parametrize(
    "draw",
    [
        lambda film: viz.show_words(np.ones((2, 4, 3)) / 3, [Word(WILD, (0,))], (1, 2, 2), film),
        lambda film: viz.show_heads(np.ones((2, 4, 3)) / 3, Word(WILD, (0,)), (1, 2, 2)),
        lambda film: viz.gallery({WILD: {WILD: film}}, title=WILD, x=WILD, y=WILD),
        lambda film: viz.films({WILD: film}, title=WILD),
        lambda film: viz.frame_sheet(film, title=WILD),
        lambda film: viz.latent_sheet(np.ones((1, 1, 2, 2)), title=WILD),
        lambda film: viz.heat_map([[1.0]], [WILD], [WILD], WILD, WILD, WILD, WILD),
        lambda film: viz.head_grid(np.ones((2, 2)), WILD, WILD),
        lambda film: viz.distances(np.eye(2), [WILD, "b"]),
        lambda film: viz.curves({WILD: {1: 1}, "b": {1: 2}}, WILD, WILD, WILD, log="xy"),
        lambda film: viz.schedule_plot(**{WILD: [1.0, 0.0]}),
        lambda film: viz.error_vs_steps({WILD: {1: 1.0, 2: 0.5}}),
        lambda film: viz.bars({WILD: {WILD: 1}}, title=WILD),
        lambda film: viz.tokens_picture([(0, WILD)]),
        lambda film: viz.recovery_map(Sweep(np.ones((1, 1)), {WILD: [WILD], "b": [1]}, WILD, {WILD: 1.0})),
        lambda film: viz.recovery_map(Sweep(np.ones(1), {WILD: [WILD]}, WILD)),
    ],
)
def test_any_word_can_be_drawn_and_is_drawn_as_it_is(draw):
    drawn = draw(Video(np.zeros((1, 8, 8, 3), np.uint8)))
    assert viz.png(drawn)
    texts = [text for text in drawn.findobj(Text) if "{$" in text.get_text()]
    assert texts and not any(text.get_parse_math() for text in texts)


def test_nothing_that_draws_is_imported_before_the_first_drawing():
    drawing = ("matplotlib", "ipywidgets", "IPython")
    code = f"import sys, moddiff.viz; print([name for name in {drawing} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_figures_of_a_tiny_run_are_small_files():
    """As a notebook makes them: 17 frames of 96 x 96, 180 tokens, 4 heads, 8 blocks, ten words."""
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
    assert max(sizes) < 64_000, sizes  # a page of ten of them stays small
    played = viz.word_animation(probs, words[1:3], grid, video)
    assert len(played) == 17 and len(played._repr_html_()) < 120_000


@pytest.mark.parametrize(
    "line",
    [
        "from moddiff.charts import bars, curves, heat_map, recovery_map, residual_norms, schedule_plot",
        "from moddiff.maps import films, gallery, latent_sheet, receptive_field, show_words, x0_strip",
        "from moddiff.schemes import flow_path, guidance_arrows, journey, rope_clocks, strip, tap_valve",
        "from moddiff.explore import Live, compare, explore, live",
        "from moddiff.trees import Tree, tree",
    ],
)
def test_figures_are_found_where_they_once_were(line):
    names = {}
    exec(line, names)
    assert len(names) > 1  # what was imported, beside Python's own
