"""The loop: what it does, in the order and with the numbers of Wan, what can be seen and changed on the way,
and what it refuses."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import small
import torch
from moddiff.components import ContractError
from PIL import Image

import moddiff
from moddiff import at, capture, conditioning, flow, patch, run, taps
from moddiff.experts import Experts
from moddiff.guidance import CFG
from moddiff.hooks import live_handles, transplant
from moddiff.image import ImageConfig, ImageEncoder
from moddiff.pipeline import Note, Pipeline
from moddiff.solvers import Euler
from moddiff.video import Video

PROMPT = "a red circle moving left"
HEIGHT, WIDTH = small.SIZE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def pipe(folder):
    return small.pipeline(folder)


@pytest.fixture(scope="module")
def i2v(folder):
    return small.pipeline(folder, "i2v")


def photo(height=50, width=70, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# ---- the loop ------------------------------------------------------------------------------------------


def test_the_loop_is_what_a_student_would_write(pipe):
    with torch.no_grad():
        cond, uncond = pipe.text.encode([PROMPT])[0], pipe.text.encode(["a star"])[0]
        x = torch.randn(small.Z, 3, 4, 6, generator=torch.Generator().manual_seed(5))[None]
        levels = np.linspace(float(np.float32(0.999)), 0, 5)[:-1]
        levels = 2.0 * levels / (1 + levels)  # shift 2
        sigmas = np.append(levels, 0).astype(np.float32)
        for i in range(4):
            t = torch.tensor([int(1000 * levels[i])])
            towards, away = pipe.dit(x, t, [cond]), pipe.dit(x, t, [uncond])
            x = x + (sigmas[i + 1] - sigmas[i]) * (away + 3 * (towards - away))
        pixels = ((pipe.vae.decode(x)[0] + 1) / 2 * 255).byte().permute(1, 2, 3, 0)
    *_, last = pipe.steps(PROMPT, seed=5, negative="a star", steps=4, solver="euler", shift=2.0, scale=3.0)
    torch.testing.assert_close(last.next, x, atol=1e-5, rtol=1e-5)
    video = pipe(PROMPT, seed=5, negative="a star", steps=4, solver="euler", shift=2.0, scale=3.0)
    assert np.abs(video.frames.astype(int) - pixels.numpy()).max() <= 1


def test_the_same_call_gives_the_same_bytes_and_another_seed_does_not(pipe):
    first = pipe(PROMPT, seed=3)
    assert first == pipe(PROMPT, seed=3) and first.encode(".mp4") == pipe(PROMPT, seed=3).encode(".mp4")
    assert first != pipe(PROMPT, seed=4)
    assert first != pipe("a blue square growing", seed=3)


def test_a_run_leaves_the_global_random_state_alone(pipe):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    pipe(PROMPT)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_settings_say_all_that_is_needed_to_do_it_again(pipe):
    video = pipe(PROMPT, seed=-1, steps=2)
    settings = dict(video.settings)
    assert settings.pop("model") == "small-t2v" and settings["seed"] >= 0
    assert pipe(**settings) == video
    assert (
        pipe(PROMPT, seed=None, steps=2).settings["seed"] != pipe(PROMPT, seed=None, steps=2).settings["seed"]
    )


def test_stepping_shows_each_state_and_ends_where_the_call_ends(pipe):
    states = list(pipe.steps(PROMPT, steps=4))
    assert [s.step for s in states] == [0, 1, 2, 3] and all(s.steps == 4 for s in states)
    assert states[0].sigma < 1 and states[-1].sigma_next == 0
    for before, after in pairwise(states):
        assert before.sigma_next == after.sigma and torch.equal(before.next, after.x)
    for s in states:
        assert int(s.t) == int(1000 * s.sigma)
        torch.testing.assert_close(s.x0, s.x - s.sigma * s.velocity)
    assert pipe.decode(states[-1].next) == pipe(PROMPT, steps=4)
    torch.testing.assert_close(states[-1].next, states[-1].x0)  # the last step goes to where the model points


def test_a_run_left_half_way_leaves_nothing_behind(pipe):
    whole = pipe(PROMPT, steps=4)
    for state in pipe.steps(PROMPT, steps=4):
        if state.step == 1:
            break
    from moddiff.places import position

    assert position() == {} and torch.is_grad_enabled() and not live_handles()
    assert pipe(PROMPT, steps=4) == whole


def test_two_runs_taken_in_turn_do_not_mix(pipe):
    alone = [s.next for s in pipe.steps(PROMPT, seed=1)]
    mixed = [
        (a.next, b.next) for a, b in zip(pipe.steps(PROMPT, seed=1), pipe.steps("a blue square", seed=2))
    ]
    assert all(torch.equal(a, m[0]) for a, m in zip(alone, mixed))


def test_a_latent_put_into_next_steers_the_rest(pipe):
    other = pipe.prepare(PROMPT, seed=9).noise
    states = pipe.steps(PROMPT, steps=3, solver="euler")
    first = next(states)
    first.next = other
    second = next(states)
    assert torch.equal(second.x, other)
    assert len(list(states)) == 1


def test_gradients_are_off_in_the_loop_and_on_outside(pipe):
    for state in pipe.steps(PROMPT, steps=2):
        assert torch.is_grad_enabled() and not state.x0.requires_grad


def test_guidance_at_scale_one_is_the_prompt_alone(pipe):
    states = list(pipe.steps(PROMPT, scale=1, steps=2))
    both = list(pipe.steps(PROMPT, scale=CFG(1.0, skip=False), steps=2))
    for once, twice in zip(states, both):
        torch.testing.assert_close(once.velocity, twice.velocity, atol=1e-5, rtol=1e-5)


def test_the_negative_prompt_of_the_model_is_used_unless_one_is_given(folder, pipe):
    other = Pipeline(**pipe.components, defaults=pipe.defaults, negative="a blue square")
    assert other(PROMPT) == pipe(PROMPT, negative="a blue square") != pipe(PROMPT)
    assert other(PROMPT, negative="") == pipe(PROMPT)


def test_solvers_are_taken_by_name_or_as_objects(pipe):
    assert pipe(PROMPT, solver="euler") == pipe(PROMPT, solver=Euler())
    assert len({pipe(PROMPT, solver=name).digest for name in ("unipc", "dpm++", "euler")}) == 3


def test_other_sizes_and_lengths(pipe):
    assert pipe(PROMPT, frames=5, size=(48, 32), steps=1).frames.shape == (5, 48, 32, 3)
    assert pipe(PROMPT, frames=1, size=[16, 16], steps=1).frames.shape == (1, 16, 16, 3)


def test_the_progress_bar_counts_the_steps(pipe, capsys):
    pipe(PROMPT, steps=2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_a_bar_comes_unasked_where_someone_looks_on_and_the_run_is_long(pipe, capsys, monkeypatch):
    monkeypatch.setattr(run, "UNASKED_AFTER", 0.0)
    pipe(PROMPT, steps=2)
    assert capsys.readouterr().err == ""  # a log, a test, a notebook that is being executed
    monkeypatch.setenv("JPY_SESSION_NAME", "01_first_video.ipynb")
    pipe(PROMPT, steps=2, progress=False)
    assert capsys.readouterr().err == ""
    pipe(PROMPT, steps=2)
    assert "/2" in capsys.readouterr().err
    monkeypatch.setattr(run, "UNASKED_AFTER", 600.0)
    pipe(PROMPT, steps=2)
    assert capsys.readouterr().err == ""


def test_who_watches_hears_of_each_step_and_may_end_the_run(pipe):
    plain, heard = pipe(PROMPT), []

    def listen(step, steps):
        heard.append((step, steps))
        if len(heard) == 5:
            raise run.Stop

    with run.watch(listen):
        assert pipe(PROMPT) == plain
        with pytest.raises(run.Stop), patch(pipe, "velocity", lambda x, where: 0 * x):
            pipe(PROMPT)
    assert heard == [(0, 3), (1, 3), (2, 3), (0, 3), (1, 3)]
    assert pipe(PROMPT) == plain and len(heard) == 5 and not live_handles()


# ---- taps ----------------------------------------------------------------------------------------------


def test_the_pipeline_shows_its_own_values_and_its_components(pipe):
    names = taps(pipe).names
    assert {"x", "velocity.cond", "velocity.uncond", "velocity", "x0"} <= set(names)
    assert (
        "dit.blocks.0.cross_attn.probs" in names
        and "text.layers.1.attn.scores" in names
        and "vae.decoder.pixels" in names
    )


def test_captured_values_are_those_of_the_steps_and_say_where_they_are(pipe):
    with capture(pipe, "x", "velocity*", "x0") as seen:
        states = list(pipe.steps(PROMPT))
    for s in states:
        for name, value in (("x", s.x), ("velocity", s.velocity), ("x0", s.x0)):
            assert torch.equal(seen.get(name, step=s.step), value)
        cond, uncond = (seen.get(f"velocity.{b}", step=s.step, branch=b) for b in ("cond", "uncond"))
        torch.testing.assert_close(s.velocity, uncond + 4 * (cond - uncond), atol=1e-6, rtol=1e-6)
    assert [w.sigma for w, _ in seen if str(w) == "x"] == [s.sigma for s in states]


def test_looking_changes_nothing(pipe):
    plain = pipe(PROMPT)
    with capture(pipe, "*", limit=None) as seen:
        assert pipe(PROMPT) == plain
    assert pipe(PROMPT) == plain
    branches = {w.branch for w, _ in seen if str(w).startswith("text.")}
    assert branches == {"cond", "uncond"}  # each prompt is encoded in its own branch


def test_a_patch_of_the_guided_velocity_reaches_the_result(pipe):
    with patch(pipe, "velocity", lambda v, where: torch.zeros_like(v)):
        states = list(pipe.steps(PROMPT, solver="euler"))
    assert torch.equal(states[-1].next, states[0].x)  # no velocity, no movement


def test_a_patch_of_x0_bends_the_path_towards_it(pipe):
    goal = torch.full((1, small.Z, 3, 4, 6), 0.5)
    with patch(pipe, "x0", lambda x0, where: goal):
        states = list(pipe.steps(PROMPT))
    torch.testing.assert_close(states[-1].next, goal, atol=1e-4, rtol=0)


def test_a_patch_of_x_is_what_the_model_sees(pipe):
    given = torch.randn(1, small.Z, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with patch(pipe, "x", lambda x, where: given, steps=[1]):
        states = list(pipe.steps(PROMPT))
    assert torch.equal(states[1].x, given) and not torch.equal(states[2].x, given)


def test_one_branch_can_be_patched_alone(pipe):
    plain = {s.step: s for s in pipe.steps(PROMPT, steps=1)}
    with capture(pipe, "velocity.uncond", "velocity.cond") as before:
        list(pipe.steps(PROMPT, steps=1))
    with (
        patch(pipe, "dit.blocks.1.resid_post", lambda x, where: x * 0, branch="cond"),
        capture(pipe, "velocity.uncond", "velocity.cond") as after,
    ):
        list(pipe.steps(PROMPT, steps=1))
    assert torch.equal(before["velocity.uncond"], after["velocity.uncond"])
    assert not torch.equal(before["velocity.cond"], after["velocity.cond"]) and plain


def test_a_transplant_of_everything_is_the_other_run(pipe):
    with capture(pipe, "dit.final") as first:
        wanted = pipe(PROMPT, seed=0)
    with patch(pipe, "dit.final", transplant(first)):
        assert pipe("a blue square growing", seed=0) == wanted


def test_an_outer_place_does_not_hide_the_steps(pipe):
    with at(step=77), capture(pipe, "x") as seen:
        list(pipe.steps(PROMPT, steps=2))
    assert [w.step for w, _ in seen] == [0, 1]


# ---- pictures ------------------------------------------------------------------------------------------


def test_the_conditioning_latent_and_mask_are_those_of_wan(i2v):
    image = photo(HEIGHT, WIDTH)
    run = i2v.prepare(PROMPT, image=image)
    pixels = torch.zeros(1, 3, small.FRAMES, HEIGHT, WIDTH)
    pixels[0, :, 0] = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1
    mask = torch.zeros(1, 4, 3, 4, 6)
    mask[:, :, 0] = 1
    with torch.no_grad():
        expected = torch.cat([mask, i2v.vae.encode(pixels)], 1)
        features = i2v.image.encode(pixels[:, :, 0])
    torch.testing.assert_close(run.extra.y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run.extra.image, features, atol=1e-5, rtol=1e-5)


def test_the_mask_of_a_first_and_a_last_frame():
    mask = conditioning.first_frame_mask(81, (21, 2, 3), 4, last=True)[0, :, :, 0, 0].T
    assert mask[0].tolist() == [1, 1, 1, 1] and mask[-1].tolist() == [0, 0, 0, 1] and mask[1:-1].sum() == 0


def test_the_picture_reaches_the_video_through_each_route(i2v):
    image, other = photo(seed=0), photo(seed=1)
    plain = i2v(PROMPT, image=image)
    assert plain == i2v(PROMPT, image=image) != i2v(PROMPT, image=other)
    blind = i2v.replace(
        image=ImageEncoder(ImageConfig(**small.IMAGE)).eval()
    )  # another CLIP tower, the same latent route
    assert blind(PROMPT, image=image) != plain


@pytest.mark.parametrize("form", ["path", "rgba", "array", "tensor", "frame"])
def test_any_form_of_picture_will_do(i2v, tmp_path, form):
    image = photo()
    image.save(tmp_path / "first.png")
    forms = dict(
        path=tmp_path / "first.png",
        rgba=image.convert("RGBA"),
        array=np.asarray(image),
        tensor=torch.tensor(np.asarray(image)).permute(2, 0, 1),
        frame=Video(np.asarray(image)[None], 8)[-1],
    )
    assert i2v(PROMPT, image=forms[form], steps=1) == i2v(PROMPT, image=image, steps=1)


@pytest.mark.parametrize("height, width", [(3, 500), (500, 3), (1, 1), (HEIGHT, WIDTH), (33, 47)])
def test_a_picture_of_any_size_is_covered_without_distortion(i2v, height, width):
    assert i2v(PROMPT, image=photo(height, width), steps=1).frames.shape == (small.FRAMES, HEIGHT, WIDTH, 3)


def test_covering_keeps_proportions_and_the_middle():
    image = torch.full((3, 40, 120), -1.0)
    image[:, :, 40:80] = 1  # the middle third of a wide picture
    covered = conditioning.cover(image, (40, 40))
    assert covered.shape == (3, 40, 40) and covered[:, :, 2:-2].min() > 0.99


@pytest.mark.parametrize(
    "task, area, picture, size",
    [
        (
            "i2v",
            (480, 832),
            (720, 1280),
            (464, 832),
        ),  # floor(floor(sqrt(399360 * 0.5625) / 8) / 2) * 16 = 464
        ("i2v", (480, 832), (1280, 720), (832, 464)),
        ("i2v", (720, 1280), (720, 1280), (720, 1280)),
        ("i2v", (480, 832), (100, 100), (624, 624)),  # sqrt(399360) = 631.9 -> 78 cells
        (
            "ti2v",
            (704, 1280),
            (720, 1280),
            (704, 1248),
        ),  # 1265.7 across -> 1248, then 722 down -> 704; the other way, 704 x 1280, distorts more
        (
            "ti2v",
            (704, 1280),
            (1000, 1000),
            (928, 960),
        ),  # 949.2: down first gives 928 x 960, across first 960 x 928; a tie takes height first
    ],
)
def test_the_size_follows_the_shape_of_the_picture(task, area, picture, size):
    stride = (4, 16, 16) if task == "ti2v" else (4, 8, 8)
    assert conditioning.size_for(torch.zeros(3, *picture), area, stride, (1, 2, 2), task) == size


def test_models_that_follow_the_picture_choose_their_own_size(folder, i2v):
    free = Pipeline(**i2v.components, defaults={**i2v.defaults, "fit": "area", "size": (48, 48)})
    assert free(PROMPT, image=photo(40, 80), steps=1).frames.shape[1:3] == (32, 64)
    assert free(PROMPT, image=photo(40, 80), size=(48, 48), steps=1).frames.shape[1:3] == (48, 48)


def test_a_held_first_frame_stays_and_its_tokens_are_told_zero(folder):
    pipe = small.pipeline(folder, "ti2v")
    image = photo(HEIGHT, WIDTH)
    told = []
    pipe.dit.register_forward_pre_hook(lambda module, arguments: told.append(arguments[1]))
    states = list(pipe.steps(PROMPT, image=image, steps=3))
    with torch.no_grad():
        z0 = pipe.vae.encode(torch.tensor(np.asarray(image)).permute(2, 0, 1)[None, :, None] / 127.5 - 1)
    for s in states:
        torch.testing.assert_close(s.x[:, :, :1], z0, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(s.next[:, :, :1], z0, atol=1e-5, rtol=1e-5)
    assert len(told) == 6 and all(
        t.shape == (1, 18) and t[0, :6].eq(0).all() and t[0, 6:].eq(states[0].t).all() for t in told[:2]
    )


def test_the_experts_take_turns_at_the_boundary(folder):
    experts = Experts(small.dit(seed=0), small.dit(seed=5), boundary=0.875)
    pipe = small.pipeline(folder, dit=experts)
    calls = []
    experts.high.register_forward_pre_hook(lambda *_: calls.append("high"))
    experts.low.register_forward_pre_hook(lambda *_: calls.append("low"))
    states = list(pipe.steps(PROMPT, steps=6, shift=12.0, scale=(3.0, 4.0)))
    expected = [name for s in states for name in (["high"] * 2 if int(s.t) >= 875 else ["low"] * 2)]
    assert calls == expected and {"high", "low"} == set(calls)


# ---- components ----------------------------------------------------------------------------------------


def test_replacing_gives_a_new_pipeline_that_shares_the_rest(pipe):
    before = pipe(PROMPT)
    other = small.dit(seed=8)
    new = pipe.replace(dit=other)
    assert new.dit is other and new.text is pipe.text and new.vae is pipe.vae and pipe.dit is not other
    assert new(PROMPT) != before and pipe(PROMPT) == before


def test_a_component_may_be_any_object_with_the_right_methods(pipe):
    class Words:
        def encode(self, prompts):
            return [torch.ones(3, small.TEXT["dim"]) * len(prompt) for prompt in prompts]

    class Nothing:
        def __call__(self, x, t, text, image=None, y=None):
            return torch.zeros_like(x) + text[0].mean() * 0

    video = pipe.replace(text=Words())(PROMPT)
    assert len(video) == small.FRAMES and not video.notes
    new = pipe.replace(dit=Nothing())
    assert new.task == "t2v"
    *_, last = new.steps(PROMPT, solver="euler")
    assert torch.equal(last.next, new.prepare(PROMPT).noise)


def test_the_task_is_the_one_given_or_the_dit_s_own_and_follows_another_dit(pipe, i2v):
    moddiff.register("dit", "from-a-picture", i2v.dit)
    assert pipe.replace(dit=i2v.dit).task == pipe.replace(dit="from-a-picture").task == "i2v"
    told = Pipeline(**pipe.components, task="ti2v")
    assert told.task == told.replace(text=pipe.text).task == "ti2v"
    assert told.replace(dit=lambda x, t, text: x).task == "ti2v" and told.replace(dit=pipe.dit).task == "t2v"


def test_components_of_other_dtypes_work_together(folder, pipe):
    mixed = small.pipeline(folder)
    mixed.text.to(torch.bfloat16)
    mixed.dit.to(torch.bfloat16)
    states = list(mixed.steps(PROMPT, steps=2))
    assert all(s.x.dtype == s.velocity.dtype == torch.float32 for s in states)
    assert len(mixed.decode(states[-1].next)) == small.FRAMES


def test_the_printed_pipeline_names_its_parts(pipe):
    text = repr(pipe)
    assert all(
        word in text
        for word in (
            "small-t2v",
            "9 frames of 32 x 48",
            "TextEncoder",
            "DiT",
            "float32 on cpu",
            "image  none",
        )
    )
    page = pipe._repr_html_()
    assert "cross_attn" in page and "decoder" in page


# ---- words, grid, region -------------------------------------------------------------------------------


def test_words_cover_every_token_once_and_in_order(pipe):
    for prompt in (PROMPT, "", "红色圆形 moving", "zebra 🦓 !", "a " * 10):
        words = pipe.words(prompt)
        assert [i for word in words for i in word.tokens] == list(range(len(pipe.text.tokens(prompt))))
        assert words[-1].text == "</s>"
    assert [word.text for word in pipe.words(PROMPT)] == ["a", "red", "circle", "moving", "left", "</s>"]


def test_the_grid_folds_tokens_into_the_video(pipe):
    assert pipe.grid == (3, 2, 3) and pipe.latent_shape() == (3, 4, 6)
    assert pipe.grid_of(17, (96, 96)) == (5, 6, 6)


def test_a_region_is_the_tokens_whose_pixels_it_touches(pipe):
    for box, frames in (
        ((0, 0, 16, 16), None),
        ((15, 15, 17, 17), 0),
        ((0, 0, 48, 32), [4, 5]),
        ((20, 3, 21, 4), range(1, 9)),
        ((0.5, 0.5, 16.5, 16.5), 8),
    ):
        chosen = range(small.FRAMES) if frames is None else [frames] if isinstance(frames, int) else frames
        expected = []
        for token in range(18):
            f, row, column = token // 6, token % 6 // 3, token % 3
            when = [0] if f == 0 else range(4 * f - 3, 4 * f + 1)
            overlaps = (
                box[0] < 16 * column + 16
                and box[2] > 16 * column
                and box[1] < 16 * row + 16
                and box[3] > 16 * row
            )
            if overlaps and set(when) & set(chosen):
                expected.append(token)
        assert pipe.region(box, frames).tolist() == expected


# ---- prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["", " ", "🦓🌈", "a" * 300, "\x00\n\t", "ein roter Kreis", "红色圆形", "ø&amp;amp;"]
)
def test_any_text_gives_a_video(pipe, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        assert len(pipe(prompt, steps=1)) == small.FRAMES


def test_a_prompt_that_is_too_long_is_cut_with_a_note(pipe):
    with pytest.warns(Note, match=r"the prompt has \d+ tokens, of which the model reads the first 31"):
        video = pipe("red circle " * 1000, steps=1)
    assert "reads the first 31" in video.notes[0] and "note: the prompt has" in repr(video)
    with pytest.warns(Note, match="the prompt has") as said:
        pipe.steps("red circle " * 1000)
        pipe("red circle " * 1000, steps=1)
    assert {note.filename for note in said} == {__file__}  # where the user called, not where we found out


def test_words_that_a_small_model_never_met_are_named(folder, pipe):
    known = Pipeline(
        **pipe.components,
        defaults=pipe.defaults,
        unknown=lambda prompt: [w for w in prompt.split() if w not in PROMPT],
    )
    with pytest.warns(Note, match="the model has never met zebra, purple"):
        assert len(known("a red zebra moving purple", steps=1)) == small.FRAMES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert known(PROMPT, steps=1).notes == ()


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            dict(prompt=["a", "b"]),
            TypeError,
            "the prompt arrived as list.*expected a str. For several videos call the pipeline once for each",
        ),
        (dict(prompt=None), TypeError, "the prompt arrived as NoneType"),
        (dict(prompt=b"red"), TypeError, "the prompt arrived as bytes"),
        (dict(negative=3), TypeError, "the negative arrived as int"),
        (dict(steps=-3), ValueError, "steps=-3; expected at least 1"),
        (dict(steps=0), ValueError, "steps=0; expected at least 1"),
        (dict(steps=2.5), ValueError, "steps=2.5; expected a whole number"),
        (dict(frames=18), ValueError, r"frames=18; expected 4n \+ 1 of them, such as 17 or 21"),
        (dict(frames=0), ValueError, r"frames=0; expected 4n \+ 1 of them, such as 1 or 5"),
        (dict(frames=9.0), ValueError, "frames=9.0; expected a whole number"),
        (
            dict(size=(95, 96)),
            ValueError,
            r"size=\(95, 96\) \(height, width\).*multiples of 16 and 16, such as \(96, 96\)",
        ),
        (dict(size=(0, 96)), ValueError, r"such as \(16, 96\)"),
        (dict(size=96), ValueError, r"size=96; expected \(height, width\)"),
        (dict(size="96x96"), ValueError, "expected .height, width. in whole pixels"),
        (dict(size=(96.0, 96)), ValueError, "size=96.0; expected a whole number"),
        (dict(solver="unipcc"), ValueError, "there is no solver component 'unipcc'; did you mean 'unipc'"),
        (dict(shift=0), ValueError, "shift=0"),
        (dict(scale=float("nan")), ValueError, "scale=nan"),
        (dict(scale=(3.0, 4.0)), ValueError, "pair"),
        (dict(seed=1.5), ValueError, "seed=1.5; expected a whole number"),
        (dict(steps=10**9), ValueError, "steps=1000000000; .* at most 1000"),
        (dict(size=(2**31, 2**31)), ValueError, "more than any model can do; expected at most 16384 each"),
        (
            dict(scale="5"),
            ValueError,
            r"scale='5' is a str; expected a number such as 5.0.*a registered guide: apg, cfg",
        ),
        (dict(scale=int), ContractError, "int cannot play the role 'guide': it is a class"),
        (dict(shift="5"), ValueError, "shift='5' is a str; expected a number such as 5.0"),
        (dict(shift=torch.tensor(3)), ValueError, r"shift=tensor\(3\) is a Tensor; expected a number"),
        (dict(control_scale="5"), ValueError, "control_scale='5' is a str; expected a number"),
        (dict(references=None), TypeError, "references=None; expected a list of pictures"),
        (
            dict(prompt=torch.zeros(3, 4)),
            TypeError,
            r"the prompt arrived as Tensor: tensor\(\[\[.*\.\.\..*expected a str",
        ),
        (
            dict(prompt="a red \udcff"),
            ValueError,
            "the prompt has no letter at place 6.*not UTF-8: read it again",
        ),
        (dict(negative="\ud83d"), ValueError, "the negative has no letter at place 0"),
        (dict(num_inference_steps=20), TypeError, "is what Diffusers calls it; here it is steps=20"),
        (
            dict(guidance_scale=5.0),
            TypeError,
            "guidance_scale= is what Diffusers calls it; here it is scale=5.0",
        ),
        (dict(negative_prompt="a"), TypeError, "here it is negative="),
        (dict(num_frames=17), TypeError, "here it is frames=81"),
        (dict(height=96), TypeError, r"here it is size=\(height, width\)"),
        (dict(width=96), TypeError, r"here it is size=\(height, width\)"),
        (dict(generator=None), TypeError, "here it is seed=0, a whole number"),
        (dict(output_type="np"), TypeError, "here it is the Video that comes back: video.frames"),
        (dict(step=3), TypeError, "a run has no setting step=; did you mean steps=?"),
        (
            dict(image=np.zeros((4, 4, 3), np.uint8)),
            ValueError,
            "small-t2v is a t2v model and takes no pictures; load an image-to-video model, such as tiny-i2v",
        ),
        (dict(mask=np.zeros((4, 4))), ValueError, "mask= was given.*leave mask out"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(pipe, options, error, message):
    options = {"prompt": PROMPT} | options
    ran = []
    handle = pipe.dit.register_forward_pre_hook(lambda *_: ran.append(1))
    for call in (pipe, pipe.steps):
        with pytest.raises(error, match=message):
            call(options["prompt"], **{name: value for name, value in options.items() if name != "prompt"})
    handle.remove()
    assert not ran


@pytest.mark.parametrize(
    "name, here",
    [
        ("to", "moddiff.load"),
        ("from_pretrained", "moddiff.load"),
        ("enable_model_cpu_offload", "device={"),
        ("scheduler", "solver="),
        ("transformer", "pipe.dit"),
        ("text_encoder", "pipe.text"),
        ("image_encoder", "pipe.image"),
    ],
)
def test_what_diffusers_pipelines_have_is_said_in_our_words(pipe, name, here):
    for asked in (pipe, Pipeline):
        with pytest.raises(AttributeError, match=f"a Pipeline has no {name}; .*{here}"):
            getattr(asked, name)
    assert not hasattr(pipe, name)


def test_a_solver_that_loses_the_numbers_is_named_and_not_the_dit(pipe):
    class Lost:
        def step(self, x, velocity, sigma, sigma_next, memory=None):
            return x * float("nan"), None

    with pytest.raises(
        ContractError, match="the solver component broke its contract: Lost.step returned NaN"
    ):
        pipe(PROMPT, solver=Lost())


def test_nan_that_a_patch_made_is_nobody_s_broken_promise(pipe):
    with (
        patch(pipe, "velocity", lambda v, where: v * float("nan"), steps=[0]),
        pytest.raises(ValueError, match="pixel values are NaN; did a patch"),
    ):
        pipe(PROMPT)


@pytest.mark.parametrize("option", [dict(video=5), dict(mask="x"), dict(references=5)])
def test_what_is_no_control_is_refused_in_words(folder, option):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(option))}=.*expected"):
        small.pipeline(folder, "vace")(PROMPT, steps=1, **option)


def test_a_size_or_length_that_was_never_trained_is_noted(pipe):
    known = Pipeline(**pipe.components, defaults={**pipe.defaults, "sizes": [[32, 48]]})
    with pytest.warns(
        Note, match="trained on 9 frames of 32 x 48; with frames=9, size=.48, 32. the video may"
    ):
        assert "(48, 32)" in known(PROMPT, size=(48, 32), steps=1).notes[0]
    with pytest.warns(Note, match="frames=5, size=.32, 48. the video may"):
        known(PROMPT, frames=5, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert known(PROMPT, steps=1).notes == () == pipe(PROMPT, size=(48, 32), steps=1).notes


def test_a_picture_that_is_needed_is_asked_for(folder, i2v):
    with pytest.raises(
        ValueError,
        match=r"small-i2v is a i2v model and needs image=: a path.*or a frame of a Video such as video\[0\]",
    ):
        i2v(PROMPT)
    with pytest.raises(ValueError, match="needs last_image="):
        small.pipeline(folder, "flf2v")(PROMPT, image=photo())
    with pytest.raises(ValueError, match="last_image= was given"):
        i2v(PROMPT, image=photo(), last_image=photo())
    with pytest.raises(
        ValueError, match=r"reads CLIP features, but the pipeline has no image component; give it one"
    ):
        i2v.replace(image=None)(PROMPT, image=photo())
    with pytest.raises(TypeError, match=r"choose a frame: video\[0\]"):
        i2v(PROMPT, image=Video(np.zeros((2, 8, 8, 3), np.uint8), 8))


def test_control_videos_of_another_shape_are_refused(folder):
    vace = small.pipeline(folder, "vace")
    with pytest.raises(ValueError, match=r"video= has shape \[1, 3, 2, 8, 8\]; expected \[1, 3, 9, 32, 48\]"):
        vace(PROMPT, video=Video(np.zeros((2, 8, 8, 3), np.uint8), 8))
    with pytest.raises(ValueError, match=r"mask= has shape \[3, 3\]; expected \[9, 32, 48\]"):
        vace(PROMPT, mask=np.zeros((3, 3)))


def test_a_pipeline_is_built_of_known_parts(pipe):
    with pytest.raises(TypeError, match="no component unet; expected text, image, dit, vae"):
        pipe.replace(unet=None)
    with pytest.raises(ValueError, match="a pipeline needs vae; only image may be None"):
        pipe.replace(vae=None)
    with pytest.raises(ValueError, match="task=None; expected one of t2v, i2v"):
        Pipeline(pipe.text, lambda *a: a, pipe.vae)
    with pytest.raises(ContractError, match=r"cannot play the role 'text': it lacks encode\(\)"):
        pipe.replace(text=object())


class Broken(torch.nn.Module):
    """Does what it is told instead of its work."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.stride = answer, (4, 8, 8)

    def forward(self, *_, **__):
        return self.answer

    encode = decode = step = forward


@pytest.mark.parametrize(
    "role, answer, message",
    [
        (
            "text",
            [torch.ones(3, 5)],
            r"Broken.encode returned .*\[3, 5\].*; expected a floating tensor \[l, 16\]",
        ),
        ("text", torch.ones(1, 3, 16), "expected a list with one"),
        ("text", [torch.full((3, 16), float("nan"))], "NaN or infinite values"),
        (
            "dit",
            torch.ones(1, 2),
            r"Broken.__call__ returned .*\[1, 2\].*; expected a floating tensor \[1, 4, 3, 4, 6\]",
        ),
        ("dit", None, "returned None.*Did it forget to return"),
        (
            "vae",
            torch.ones(1, 3, 8, 32, 48),
            r"Broken.decode returned .*\[1, 3, 8, 32, 48\].*; expected a floating tensor \[1, 3, 9, 32, 48\]",
        ),
    ],
)
def test_a_component_that_breaks_its_promise_is_caught_where_they_meet(pipe, role, answer, message):
    config = {"defaults": pipe.defaults, "task": "t2v"}
    parts = pipe.components | {role: Broken(answer)}
    if role == "dit":
        parts["dit"].config = pipe.dit.config
    with pytest.raises(ContractError, match=message):
        Pipeline(**parts, **config)(PROMPT)


def test_a_solver_of_ones_own_is_checked_and_may_be_registered(pipe):
    class HalfSteps:
        def step(self, x, velocity, sigma, sigma_next, memory=None):
            return x + (sigma_next - sigma) * velocity, None

    moddiff.register("solver", "half-steps", HalfSteps)
    assert (
        pipe(PROMPT, solver="half-steps") == pipe(PROMPT, solver=HalfSteps()) == pipe(PROMPT, solver="euler")
    )
    with pytest.raises(ContractError, match=r"expected the pair \(x, memory\)"):
        pipe(PROMPT, solver=Broken(torch.ones(1)))


def test_a_registered_component_is_taken_by_name(pipe):
    moddiff.register("dit", "second", small.dit(seed=8))
    assert pipe.replace(dit="second")(PROMPT) == pipe.replace(dit=small.dit(seed=8))(PROMPT)
    with pytest.raises(ValueError, match="there is no dit component 'third'"):
        pipe.replace(dit="third")


@pytest.mark.parametrize(
    "box, frames, message",
    [
        ((0, 0, 49, 32), None, "expected .x0, y0, x1, y1. with 0 <= x0 < x1 <= 48"),
        ((5, 5, 5, 9), None, "0 <= x0 < x1"),
        ((0, 0, 4, 4), 9, "frame numbers from 0 to 8"),
        ((0, 0, 4, 4), [], "frame numbers from 0 to 8"),
    ],
)
def test_a_region_outside_the_video_is_refused(pipe, box, frames, message):
    with pytest.raises(ValueError, match=message):
        pipe.region(box, frames)


def test_nan_from_a_patch_is_reported_and_not_painted(pipe):
    with (
        patch(pipe, "velocity", lambda v, where: v * float("nan"), steps=[2]),
        pytest.raises(ValueError, match="pixel values are NaN"),
    ):
        pipe(PROMPT)


# ---- step lists -------------------------------------------------------------------------------------------


def test_a_step_list_is_the_same_run_as_the_shifted_grid_that_has_its_levels(pipe):
    levels = flow.schedule(3, 5.0, "euler").sigmas.tolist()
    by_number = pipe("red", steps=3, shift=5.0, solver="euler")
    by_list = pipe("red", steps=levels, solver="euler")
    assert np.array_equal(by_number.frames, by_list.frames)
    assert by_list.settings["steps"] == tuple(levels[:-1]) and "shift" not in by_list.settings
    known = {name: value for name, value in by_list.settings.items() if name not in ("model", "prompt")}
    assert np.array_equal(pipe("red", **known).frames, by_list.frames)


def test_a_shift_beside_a_step_list_is_refused(pipe):
    with pytest.raises(
        ValueError, match=r"shift=3 bends .* the list \(1, 0.5\); leave shift out, or give steps=2"
    ):
        pipe("red", steps=[1.0, 0.5], shift=3)


def test_a_dit_made_for_settings_brings_them_and_leaves_with_them(pipe):
    sampling = {"steps": (0.999, 0.5), "solver": "euler", "scale": 1.0}

    class Made:
        def __init__(self, inner):
            self.wraps, self.sampling = inner, sampling

        def __call__(self, *inputs, **options):
            return self.wraps(*inputs, **options)

    fast = pipe.replace(dit=Made(pipe.dit))
    video = fast("red")
    assert {name: video.settings[name] for name in sampling} == sampling
    assert "2 steps of euler, scale 1.0" in repr(fast) and "shift" not in repr(fast)
    assert not [note for note in video.notes if "trained for" in note]
    with pytest.warns(Note, match=r"trained for steps \(0.999, 0.5\).* and this run has steps 3:"):
        fast("red", steps=3)
    again = fast.replace(dit=pipe.dit)
    assert again.defaults == pipe.defaults
