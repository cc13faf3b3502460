"""Do the hooks keep their word on the real components and the whole pipeline?

Oracles: edited weights, and runs without any session.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import small

from moddiff import experiment
from moddiff.hooks import (
    NeverFired,
    capture,
    identity,
    live_handles,
    patch,
    position,
    replace_attend,
    taps,
    transplant,
    zero,
)

PROMPT, OTHER = "a red circle moving left", "a blue square growing"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def picture():
    return torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("task", ["t2v", "i2v", "vace"])
def test_capturing_everything_everywhere_changes_no_bit_of_the_video(task, tmp_path):
    pipe = small.pipeline(tmp_path, task)
    options = dict(seed=0, steps=2) | ({"image": picture()} if task == "i2v" else {})
    plain = pipe(PROMPT, **options)
    with capture(pipe, "*", limit=None) as seen:
        looked = pipe(PROMPT, **options)
    assert (looked.frames == plain.frames).all() and not live_handles()
    for where, value in seen:
        assert value.ndim == len(where.layout.split()), (
            f"{where} is {list(value.shape)}, declared {where.layout}"
        )
        assert torch.isfinite(value).all() or where.name.endswith("scores"), str(where)
    roles = {str(where).partition(".")[0] for where, _ in seen}
    assert {"text", "dit", "vae", "x", "velocity", "x0"} <= roles and ("image" in roles) == (task == "i2v")
    unseen = {name for name in taps(pipe).names if not name.endswith("attend")} - set(seen.names)
    idle = (
        ("image.layers.1.",) if task == "i2v" else ("dit.image",)
    )  # Wan reads the last but one layer of CLIP, and only some models read an image
    idle += ("vae.encoder.",) if task == "t2v" else ()
    unseen = [
        name for name in unseen if not name.startswith(idle) and not name.endswith("history")
    ]  # a convolution of width 1 has no history
    assert not unseen, "declared, and never shown"


@pytest.mark.parametrize("attention", ["self_attn", "cross_attn"])
@pytest.mark.parametrize("head", [0, 1])
def test_zeroing_a_head_equals_a_model_whose_output_columns_are_zero(pipe, attention, head):
    dit = copy.deepcopy(pipe.dit)
    with torch.no_grad():
        getattr(dit.blocks[1], attention).out.weight[:, head * 16 : (head + 1) * 16] = 0
    expected = pipe.replace(dit=dit)(PROMPT, seed=0)
    with patch(pipe.dit, f"blocks.1.{attention}.heads", zero(heads=head)):
        ablated = pipe(PROMPT, seed=0)
    assert (ablated.frames == expected.frames).all()


def test_an_ablation_in_one_branch_differs_from_both_and_the_steps_before_stay(pipe):
    plain = [state.next for state in pipe.steps(PROMPT, seed=0)]
    with patch(pipe.dit, "blocks.1.cross_attn.heads", zero(heads=0), steps=1, branch="cond"):
        ablated = [state.next for state in pipe.steps(PROMPT, seed=0)]
    with patch(pipe.dit, "blocks.1.cross_attn.heads", zero(heads=0), steps=1):
        both = [state.next for state in pipe.steps(PROMPT, seed=0)]
    assert (
        torch.equal(plain[0], ablated[0])
        and not torch.equal(plain[1], ablated[1])
        and not torch.equal(both[1], ablated[1])
    )


def test_identity_on_probs_stays_within_rounding_and_probs_are_a_distribution(pipe):
    plain = list(pipe.steps(PROMPT, seed=0))[-1].next
    with (
        patch(pipe.dit, "blocks.*.*.probs", identity),
        capture(pipe.dit, "blocks.*.cross_attn.probs") as seen,
    ):
        written = list(pipe.steps(PROMPT, seed=0))[-1].next
    torch.testing.assert_close(written, plain, atol=2e-5, rtol=0)
    probs = seen.stack("cross_attn.probs")  # [block, step, branch, b, heads, n, m]
    assert probs.shape == (2, 3, 2, 1, 2, 3 * 2 * 3, small.TEXT_LEN)
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]), atol=1e-5, rtol=0)


def test_transplanting_all_predictions_gives_the_other_video(pipe):
    expected = pipe(PROMPT, seed=0)
    with capture(pipe, "velocity") as A:
        pipe(PROMPT, seed=0)
    with patch(pipe, "velocity", transplant(A)):
        mixed = pipe(OTHER, seed=0)
    assert (mixed.frames == expected.frames).all() and not (
        pipe(OTHER, seed=0).frames == expected.frames
    ).all()


def test_transplanting_the_last_block_in_the_cond_branch_gives_its_velocity(pipe):
    with (
        capture(pipe.dit, "blocks.1.resid_post", branch="cond") as A,
        capture(pipe, "velocity.cond") as theirs,
    ):
        pipe(PROMPT, seed=0)
    with (
        patch(pipe.dit, "blocks.1.resid_post", transplant(A), branch="cond"),
        capture(pipe, "velocity.cond") as ours,
    ):
        pipe(OTHER, seed=0)
    assert torch.equal(ours.stack("velocity.cond"), theirs.stack("velocity.cond"))


def test_transplanting_a_region_moves_those_tokens_and_no_other(pipe):
    tokens = pipe.region((0, 0, 16, 32))
    with (
        capture(pipe.dit, "blocks.1.resid_post", branch="cond", steps=0) as A,
        capture(pipe, "velocity.cond", steps=0) as theirs,
    ):
        pipe(PROMPT, seed=0)
    with capture(pipe, "velocity.cond", steps=0) as plain:
        pipe(OTHER, seed=0)
    with (
        patch(pipe.dit, "blocks.1.resid_post", transplant(A, tokens=tokens), branch="cond", steps=0),
        capture(pipe, "velocity.cond", steps=0) as mixed,
    ):
        pipe(OTHER, seed=0)
    mixed, plain, theirs = (
        seen["velocity.cond"] for seen in (mixed, plain, theirs)
    )  # [1, c, f, h, w], 8 pixels a cell
    assert (
        torch.equal(mixed[..., :2], theirs[..., :2])
        and torch.equal(mixed[..., 2:], plain[..., 2:])
        and not torch.equal(theirs, plain)
    )


def test_the_cells_of_the_guide_run_as_written(pipe):
    dit = pipe.dit
    assert "blocks.0.cross_attn.probs" in repr(taps(dit, "blocks.0.*"))

    with capture(
        dit, "blocks.*.cross_attn.probs", steps=[0, 1, 2], branch="cond", dtype=torch.float16, device="cpu"
    ) as seen:
        pipe(PROMPT, seed=0)
    probs = seen.stack("cross_attn.probs")
    assert probs.shape[:3] == (2, 3, 1) and probs.dtype == torch.float16 and "6 values" in repr(seen)

    def only_the_noun(probs, where):
        keep = torch.zeros_like(probs)
        keep[..., 2] = 1
        return keep

    with (
        patch(dit, "blocks.*.cross_attn.probs", only_the_noun, branch="cond"),
        capture(dit, "blocks.*.cross_attn.heads", branch="cond") as heads,
        capture(dit, "blocks.*.cross_attn.v", branch="cond") as v,
    ):
        pipe(PROMPT, seed=0)
    value = v.stack("cross_attn.v")[..., 2:3, :]
    torch.testing.assert_close(
        heads.stack("cross_attn.heads"), value.expand_as(heads.stack("cross_attn.heads")), atol=1e-6, rtol=0
    )

    def softer(attend, q, k, v, where):
        return attend(q * 0.5, k, v)

    twin = copy.deepcopy(dit)
    with torch.no_grad():
        twin.blocks[1].self_attn.norm_q.weight *= 0.5
    expected = pipe.replace(dit=twin)(PROMPT, seed=0)
    with patch(dit, "blocks.1.self_attn.attend", softer):
        softened = pipe(PROMPT, seed=0)
    assert abs(softened.frames.astype(int) - expected.frames.astype(int)).max() <= 1

    with capture(dit, "blocks.*.resid_post", branch="cond") as A:
        pipe(PROMPT, seed=0)
    with patch(dit, "blocks.1.resid_post", transplant(A), branch="cond"):
        pipe(OTHER, seed=0)


def test_steps_left_half_way_leave_nothing_behind(pipe):
    plain = pipe(PROMPT, seed=0)
    with patch(pipe, "dit.blocks.*.resid_post", zero()):
        state = next(pipe.steps(PROMPT, seed=0))
        assert not state.velocity.isnan().any()
    assert not live_handles() and (pipe(PROMPT, seed=0).frames == plain.frames).all()


def test_interleaved_runs_do_not_mix_their_places(pipe):
    with capture(pipe, "velocity.*") as seen:
        for _ in zip(pipe.steps(PROMPT, seed=0), pipe.steps(OTHER, seed=0)):
            pass
    assert [where.step for where, _ in seen] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_a_branch_that_guidance_skips_is_loud(pipe):
    with (
        pytest.raises(
            NeverFired, match="at steps 0..2 and branches cond; asked were steps all and branches uncond"
        ),
        patch(pipe, "dit.blocks.0.resid_post", identity, branch="uncond"),
    ):
        pipe(PROMPT, seed=0, scale=1.0)


def test_a_kernel_may_be_swapped_for_one_block(pipe):
    from moddiff.attention import attend

    plain = list(pipe.steps(PROMPT, seed=0))[-1].next
    with patch(
        pipe.dit, "blocks.*.self_attn.attend", replace_attend(lambda q, k, v: attend(q, k, v, kernel="math"))
    ):
        swapped = list(pipe.steps(PROMPT, seed=0))[-1].next
    torch.testing.assert_close(swapped, plain, atol=2e-5, rtol=0)


def test_a_whole_pipelines_capture_is_forecast_to_the_byte(pipe):
    for session in (
        capture(pipe, "dit.blocks.*.cross_attn.probs", "x", "velocity*", branch=None),
        capture(pipe, "dit.blocks.*", steps=[0, 2], branch="cond"),
    ):
        forecast = session.cost(steps=3, size=small.SIZE, frames=small.FRAMES, words=4)
        with session as seen:
            pipe(PROMPT, seed=0)
        names = {row[0]: row[4] for row in forecast}
        assert {name: len([1 for w, _ in seen if str(w) == name]) for name in seen.names} == names
        assert forecast.bytes == seen.bytes


class Quiet:
    """A wrapper of a reader's own: it says what it wraps, and nothing else."""

    def __init__(self, inner):
        self.wraps = inner

    def __call__(self, *inputs, **options):
        return self.wraps(*inputs, **options)


def test_taps_patches_forecasts_and_experiments_work_through_a_wrapper(pipe, tmp_path):
    wrapped = pipe.replace(dit=Quiet(Quiet(pipe.dit)))
    assert taps(wrapped).names == taps(pipe).names and taps(wrapped.dit).names == taps(pipe.dit).names
    plain, name = pipe(PROMPT, seed=0), "blocks.1.cross_attn.probs"
    with capture(pipe.dit, name, branch="cond") as bare, capture(pipe, "dit." + name, branch="cond") as whole:
        pipe(PROMPT, seed=0)
    with capture(wrapped.dit, name, branch="cond") as seen:
        assert (wrapped(PROMPT, seed=0).frames == plain.frames).all()
    assert torch.equal(seen.stack(name), bare.stack(name)) and torch.equal(
        whole.stack(name), bare.stack(name)
    )
    with patch(pipe.dit, "blocks.1.resid_post", zero()):
        ablated = pipe(PROMPT, seed=0)
    with experiment("through a wrapper", wrapped, file=tmp_path / "e.sqlite") as e:
        e.patch(wrapped.dit, "blocks.1.resid_post", zero())
        assert (e.run(wrapped, PROMPT, seed=0).frames == ablated.frames).all()
    video = dict(size=small.SIZE, frames=small.FRAMES, words=4)
    assert capture(wrapped.dit, name).cost(**video).bytes == capture(pipe.dit, name).cost(**video).bytes


def test_a_stop_leaves_a_run_of_the_pipeline_without_a_trace(pipe):
    plain, states = pipe(PROMPT, seed=0), []
    with capture(pipe.dit, "blocks.0.cross_attn.probs", steps=1, branch="cond") as whole:
        pipe(PROMPT, seed=0)
    with capture(pipe.dit, "blocks.0.cross_attn.probs", steps=1, branch="cond", stop=True) as seen:
        pipe(PROMPT, seed=0, progress=True)
        states.append("it went on")
    with capture(pipe, "velocity", steps=1, stop=True) as velocity:
        states += pipe.steps(PROMPT, seed=0)
    assert [state.step for state in states] == [0] and len(seen) == len(whole) == len(velocity) == 1
    name = "blocks.0.cross_attn.probs"
    assert torch.equal(seen[name], whole[name])
    assert not live_handles() and position() == {} and torch.is_grad_enabled()
    assert (pipe(PROMPT, seed=0).frames == plain.frames).all()


def test_a_gradient_of_one_step_of_a_pipeline_foretells_a_small_patch(pipe):
    run = pipe.prepare(PROMPT, seed=0)
    t = run.schedule.timesteps[:1]
    name, context = "blocks.1.resid_pre", run.context["cond"]
    pipe.dit.requires_grad_(False)
    with capture(pipe.dit, name, grad=True) as seen:
        pipe.dit(run.noise, t, context)[0, 0, 0, 0, 0].backward()
    direction = torch.randn_like(seen[name])

    def moved(amount):
        with torch.no_grad(), patch(pipe.dit, name, lambda x, where: x + amount * direction):
            return float(pipe.dit(run.noise, t, context)[0, 0, 0, 0, 0])

    slope = (moved(0.01) - moved(-0.01)) / 0.02
    assert abs(float((seen[name].grad * direction).sum()) - slope) < 0.01 * abs(slope) + 1e-4
