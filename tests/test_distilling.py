"""Distilling the tiny model: what the student is asked for, and what it is taught."""

import numpy as np
import pytest
import torch
from tiny_stages import shrink

from moddiff import load
from moddiff.flow import schedule
from moddiff.guidance import CFG
from moddiff.roles import apply
from moddiff.tiny import distilling, dit_stages, world
from moddiff.tiny.encoder_stages import new_text_encoder, train_tokenizer


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A teacher of one block, and two of its paths."""
    shrink(monkeypatch)
    (tmp_path / "tokenizer.json").write_text(train_tokenizer())
    torch.manual_seed(0)
    text = new_text_encoder(tmp_path / "tokenizer.json").eval().requires_grad_(False)
    dit = dit_stages.new_dit(dit_stages.DIT_CONFIG).eval().requires_grad_(False)
    distilling.cache_paths(text, dit, tmp_path / "paths", 2)
    return text, dit, tmp_path / "paths"


def test_the_step_list_is_that_of_four_shifted_steps_and_each_is_five_of_the_teacher():
    four = schedule(4, distilling.TEACHER["shift"])
    torch.testing.assert_close(distilling.KNOTS, four.sigmas)
    assert distilling.TIMES.tolist() == four.timesteps.tolist() == [999, 937, 833, 624]
    assert schedule(distilling.SAMPLING["steps"], 1.0).timesteps.tolist() == [999, 937, 833, 624]


def test_no_path_shows_a_held_out_triple_and_all_languages_are_asked_in():
    captions = [distilling.path_caption(i) for i in range(60)]
    scenes = [world.parse(caption) for caption in captions]
    things = [thing for scene in scenes for thing in scene.things]
    assert not any(map(world.held_out, things)) and len(things) == 90
    assert any("红" in text or "蓝" in text or "绿" in text for text in captions) and any(
        " ein" in t for t in captions
    )


def test_a_path_is_a_run_of_the_pipeline(made):
    """The teacher's end is where the pipeline arrives from the same noise, by its own loop."""
    text, dit, paths = made
    pipe = load("tiny").replace(text=text, dit=dit)
    options = dict(distilling.TEACHER, seed=0)
    run = pipe.prepare(distilling.path_caption(0), **options)
    x, memory = distilling.path_noise(0, (16, 5, 12, 12))[:1], None
    guide = CFG(distilling.TEACHER["scale"])
    for t, sigma, sigma_next in run.schedule:
        with torch.no_grad():
            velocity = guide(pipe.predictor(run, x, t), sigma, t)
        x, memory = run.solver.step(x, velocity, sigma, sigma_next, memory)
    kept = torch.from_numpy(np.load(paths / "latents.npy")).float()
    assert kept.shape == (2, 5, 16, 5, 12, 12)
    # The paths were walked in batches and in half precision where the machine is fast in it.
    torch.testing.assert_close(kept[0, 4], x[0], atol=0.1, rtol=0.05)


def test_a_cache_cut_short_goes_on_to_the_same_paths(made, tmp_path, monkeypatch):
    text, dit, _ = made
    monkeypatch.setattr(distilling, "TOGETHER", 1)
    distilling.cache_paths(text, dit, tmp_path / "again", 2)
    whole = np.load(tmp_path / "again" / "latents.npy")
    kept = np.lib.format.open_memmap(tmp_path / "again" / "latents.npy", "r+")
    kept[1] = 0
    (tmp_path / "again" / "latents.done").write_text("1")
    distilling.cache_paths(text, dit, tmp_path / "again", 2)
    assert np.array_equal(np.load(tmp_path / "again" / "latents.npy"), whole) and whole[1].any()


def test_the_target_is_the_mean_velocity_so_that_a_perfect_student_lands_on_the_knots(made):
    stage = distilling.FastStage(*made, batch=4)
    drawn = next(d for d in (stage.draw(i, np.random.default_rng([0, i])) for i in range(9)) if "here" in d)
    x, knot = drawn["here"], drawn["knot"]
    sigma, left = distilling.KNOTS[knot], distilling.KNOTS[knot + 1]
    perfect = (x - drawn["there"]) / (sigma - left).view(-1, 1, 1, 1, 1)
    landed = x + (left - sigma).view(-1, 1, 1, 1, 1) * perfect
    torch.testing.assert_close(landed, drawn["there"])
    stage.velocity = lambda x, knot, words: perfect
    assert stage.loss(**drawn)[0] == 0
    assert knot.tolist() == [0, 1, 2, 3]


def test_only_the_adapter_learns_and_a_step_moves_it_on_either_way(made):
    dit = made[1]
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    stage = distilling.FastStage(*made, batch=2)
    learns = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    assert learns and all(".changes." in name for name in learns)
    drawn = [stage.draw(i, np.random.default_rng([0, i])) for i in range(20)]
    cached, own = (next(d for d in drawn if ("here" in d) == there) for there in (True, False))
    for batch in (cached, own):
        stage.model.zero_grad()
        stage.loss(**batch)[0].backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.model.parameters())
    for name, value in dit.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_most_steps_go_its_own_way_and_none_of_them_to_the_noise(made):
    """At the first knot both ways are the same; behind it the student has to see where it brings itself."""
    stage = distilling.FastStage(*made, batch=4)
    drawn = [stage.draw(i, np.random.default_rng([0, i])) for i in range(200)]
    own = [batch["knot"] for batch in drawn if "here" not in batch]
    assert set(own) == {1, 2, 3} and 0.5 < len(own) / len(drawn) < 0.7


def test_on_its_own_way_a_student_that_is_the_teacher_unguided_steps_by_euler(made):
    """Up to the knot by the student's velocity, one step a knot; from there the teacher walks five."""
    stage = distilling.FastStage(*made, batch=2)
    prompts = ["a red circle moving left"] * 2
    words = stage.text.encode(prompts)
    x, there = stage.own_way(prompts, words, 1, seed=3)
    noise = torch.randn(2, 16, 5, 12, 12, generator=torch.Generator().manual_seed(3))
    by_hand = noise + (distilling.KNOTS[1] - distilling.KNOTS[0]) * stage.velocity(
        noise, torch.tensor([0, 0]), words
    )
    torch.testing.assert_close(x, by_hand)
    teacher = distilling.Teacher(stage.teacher, stage.text, prompts)
    torch.testing.assert_close(there, teacher.walk(x, 5, 5)[-1])


def test_a_fresh_student_is_the_teacher_without_guidance(made):
    text, dit, _ = made
    stage, words = distilling.FastStage(*made, batch=2), text.encode(["a blue star growing"])
    x = torch.randn(1, 16, 5, 12, 12)
    plain = apply(dit, [])(x, distilling.TIMES[:1].float(), words)
    torch.testing.assert_close(stage.model["dit"](x, distilling.TIMES[:1].float(), words), plain)
