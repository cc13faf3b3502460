"""Are sweeps labelled, resumable and deterministic, and do the maps say what the arithmetic says?"""

import json

import numpy as np
import pytest
import torch
from toy import BLOCKS, HEADS, Pipe, Toy, by_hand, noise

from moddiff import tracing
from moddiff.hooks import at, capture, mean_over, patch, transplant
from moddiff.tracing import Sweep, head_ablation, patching_map, recovered, sweep


def test_recovered_is_zero_at_low_and_one_at_high():
    assert (
        recovered(3.0, low=3, high=7) == 0
        and recovered(torch.tensor(7.0), low=3, high=7) == 1
        and recovered(5, 3, 7) == 0.5
        and recovered(5, 7, 3) == 0.5
    )


@pytest.mark.parametrize(("value", "low", "high"), [(1, 2, 2), (float("nan"), 0, 1), (1, 0, float("inf"))])
def test_recovered_refuses_a_scale_without_length(value, low, high):
    with pytest.raises(
        ValueError,
        match="low and high must differ and all be finite numbers; choose a metric that tells",
    ):
        recovered(value, low, high)


def test_a_sweep_puts_each_number_at_its_labels():
    grid = sweep(
        lambda block, step, word: block * 100 + step * 10 + len(word),
        block=range(3),
        step=np.arange(0, 8, 4),
        word=["a", "bcd"],
        progress=False,
    )
    assert grid.values.shape == (3, 2, 2) and grid.axes == {
        "block": [0, 1, 2],
        "step": [0, 4],
        "word": ["a", "bcd"],
    }
    assert grid.at(block=2, step=4, word="bcd") == 243 and grid.best() == {
        "block": 2,
        "step": 4,
        "word": "bcd",
    }
    assert grid.at(word="a").values.tolist() == [[1, 41], [101, 141], [201, 241]]
    assert "block \\ step" in repr(grid.at(word="a")) and "201.000" in repr(grid.at(word="a"))


def test_a_sweep_that_was_interrupted_goes_on_where_it_stopped(tmp_path):
    file, ran = tmp_path / "sweep.jsonl", []

    def run(block, step):
        ran.append((block, step))
        if len(ran) == 4:
            raise KeyboardInterrupt
        return torch.randn(()) + block

    with pytest.raises(KeyboardInterrupt):
        sweep(run, block=range(2), step=range(3), file=file, progress=False)
    with open(file, "a") as cut:
        cut.write('{"cell": [1, 0], "val')  # as if the power had gone
    grid = sweep(run, block=range(2), step=range(3), file=file, progress=False)
    assert ran == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 0), (1, 1), (1, 2)]
    ran[:] = [None] * 10
    again = sweep(run, block=range(2), step=range(3), progress=False)
    assert np.array_equal(grid.values, again.values)
    assert len(file.read_text().splitlines()) == 7 and all(
        json.loads(line) for line in file.read_text().splitlines()
    )


def test_a_file_of_another_sweep_is_refused(tmp_path):
    sweep(lambda block: block, block=range(2), file=tmp_path / "a", progress=False)
    with pytest.raises(
        ValueError,
        match=r"holds another sweep, over \{'block': \[0, 1\]\}; "
        r"this one is over \{'block': \[0, 1, 2\]\} with seed 0. "
        "Give it its own file",
    ):
        sweep(lambda block: block, block=range(3), file=tmp_path / "a", progress=False)


@pytest.mark.parametrize(
    "held",
    [
        "a diary\n",
        "a note",
        "two\nlines",
        "[1, 2]\n",
        '{"axes": 1}\n{"cell"}\n',
        '"axes"\n',
        "\x89PNG\r\n\x1a",
    ],
)
def test_a_file_that_is_no_sweep_is_refused_and_kept(tmp_path, held):
    file = tmp_path / "a"
    file.write_bytes(held.encode("latin-1"))
    with pytest.raises(ValueError, match="holds (something else|another sweep, over 1); this one is over"):
        sweep(lambda block: block, block=range(3), file=file, progress=False)
    assert file.read_bytes() == held.encode("latin-1")


@pytest.mark.parametrize("written", [0, 1, 20])
def test_a_sweep_that_was_stopped_in_its_first_line_begins_anew(tmp_path, written):
    file = tmp_path / "a"
    sweep(lambda block: block, block=range(3), file=file, progress=False)
    whole = file.read_bytes()
    file.write_bytes(whole[:written])
    sweep(lambda block: block, block=range(3), file=file, progress=False)
    assert file.read_bytes() == whole


def test_a_file_of_this_sweep_with_a_broken_line_in_it_is_refused(tmp_path):
    file = tmp_path / "a"
    sweep(lambda block: block, block=range(3), file=file, progress=False)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:8], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="holds something else"):
        sweep(lambda block: block, block=range(3), file=file, progress=False)


def test_a_full_disk_is_named_with_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        tracing._append("/dev/full", {"cell": [0], "value": 1.0})


def test_labels_are_numbers_or_text():
    with pytest.raises(TypeError, match=r"sweep over heads: the label \[0, 1\] is no number or text"):
        sweep(lambda heads: 0, heads=[[0, 1], [2]], progress=False)


def test_a_sweep_is_deterministic_in_any_order_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    forward = sweep(lambda a: torch.randn(()), a=[1, 2, 3], progress=False)
    assert torch.equal(torch.randn(3), expected)
    backward = sweep(lambda a: torch.randn(()), a=[3, 2, 1], progress=False)
    assert forward.values.tolist() == backward.values.tolist()[::-1] and len(set(forward.values)) == 3
    assert (
        sweep(lambda a: torch.randn(()), a=[1, 2, 3], seed=1, progress=False).values.tolist()
        != forward.values.tolist()
    )


def test_a_sweep_says_what_is_missing():
    with pytest.raises(
        TypeError,
        match=r"run\(block=0\) returned NoneType; expected one number. Did the function forget to return\?",
    ):
        sweep(lambda block: None, block=range(2), progress=False)
    with pytest.raises(TypeError, match=r"run\(block=0\) returned Tensor; expected one number"):
        sweep(lambda block: torch.ones(2), block=range(2), progress=False)
    with pytest.raises(ValueError, match=r"such as block=range\(4\); step has none"):
        sweep(lambda block, step: 0, block=range(2), step=[], progress=False)
    grid = Sweep([[1, 2]], {"block": [0], "step": [3, 5]})
    with pytest.raises(ValueError, match="step=4 was not swept; step has 3, 5"):
        grid.at(step=4)
    with pytest.raises(ValueError, match="no axis head; this sweep has block, step"):
        grid.at(head=4)


def test_progress_is_shown(capsys):
    sweep(lambda block: 0, block=range(2), title="heads")
    assert "heads" in capsys.readouterr().err


def test_a_sweep_shows_its_own_values():
    ax = Sweep([[0, 1, 2], [3, 4, -5]], {"block": [4, 7], "step": [0, 5, 10]}).show(low=-2, high=2).axes[0]
    assert ax.images[0].get_array().tolist() == [[0, 1, 2], [3, 4, -5]] and ax.images[0].get_clim() == (-2, 2)


def test_a_head_ablation_is_the_difference_made_by_zeroed_columns():
    toy, x = Toy().requires_grad_(False), noise()
    grid = head_ablation(
        toy,
        lambda: toy(x),
        lambda out: out.square().mean(),
        tap="blocks.{block}.attn.heads",
        heads=HEADS,
        progress=False,
    )
    plain = by_hand(toy, x).square().mean()
    assert grid.values.shape == (BLOCKS, HEADS) and abs(grid.controls["baseline"] - plain) < 1e-6
    assert grid.title == "metric without a head of blocks.*.attn.heads, minus with all"
    for block in range(BLOCKS):
        for head in range(HEADS):

            def without(tap, value, i, block=block, head=head):
                if (tap, i) != ("heads", block):
                    return value
                kept = torch.ones(HEADS)
                kept[head] = 0
                return value * kept[:, None, None]

            assert (
                abs(grid.at(block=block, head=head) - (by_hand(toy, x, without).square().mean() - plain))
                < 1e-6
            )


def test_a_head_ablation_takes_other_edits():
    toy, x = Toy().requires_grad_(False), noise()
    grid = head_ablation(
        toy,
        lambda: toy(x),
        lambda out: out.square().mean(),
        tap="blocks.{block}.attn.heads",
        heads=[1],
        blocks=[2],
        edit=lambda **axes: mean_over("tokens", **axes),
        progress=False,
    )

    def averaged(tap, value, i):
        mean = value.mean(2, keepdim=True).expand_as(value)
        return torch.cat([value[:, :1], mean[:, 1:2], value[:, 2:]], 1) if (tap, i) == ("heads", 2) else value

    assert (
        abs(
            grid.at(block=2, head=1)
            - (by_hand(toy, x, averaged).square().mean() - by_hand(toy, x).square().mean())
        )
        < 1e-6
    )


def one_pass(pipe, x):
    """The dit at one step and branch, as the loop would call it."""
    with torch.no_grad(), at(step=0, sigma=1.0, branch="cond"):
        return pipe.dit(x)


def test_a_patching_map_restores_all_at_the_last_block_and_nothing_by_identity():
    pipe, metric = Pipe(), lambda out: out.square().mean()
    with capture(pipe.dit, "blocks.*.resid_post") as A:
        high = metric(one_pass(pipe, noise(1)))
    grid = patching_map(
        pipe.dit, lambda: one_pass(pipe, noise(2)), A, metric, high=high, steps=[0], progress=False
    )
    assert grid.axes == {"block": [0, 1, 2], "step": [0]}
    assert abs(grid.values - 1).max() < 1e-5  # the whole residual stream of any block decides what follows
    assert grid.controls["identity"] == 0 and abs(grid.controls["noise"] - 1) > 1e-2
    some = patching_map(
        pipe.dit,
        lambda: one_pass(pipe, noise(2)),
        A,
        metric,
        high=high,
        steps=[0],
        tokens=[0, 1],
        progress=False,
    )
    theirs = {}
    by_hand(pipe.dit, noise(1), lambda tap, value, i: theirs.setdefault((tap, i), value))
    for block in range(BLOCKS):

        def mixed(tap, value, i, block=block):
            return (
                torch.cat([theirs[tap, i][:, :2], value[:, 2:]], 1)
                if (tap, i) == ("resid_post", block)
                else value
            )

        low, part = metric(by_hand(pipe.dit, noise(2))), metric(by_hand(pipe.dit, noise(2), mixed))
        assert abs(some.at(block=block, step=0) - (part - low) / (high - low)) < 1e-4


def test_transplanting_the_last_block_at_every_step_gives_the_other_run_back_exactly():
    pipe = Pipe()
    a = pipe(seed=1)
    with capture(pipe, "dit.blocks.2.resid_post", "x", steps=range(4)) as A:
        pipe(seed=1)
    with patch(pipe, "dit.blocks.2.resid_post", transplant(A)), patch(pipe, "x", transplant(A), steps=0):
        assert torch.equal(pipe(seed=2), a)
