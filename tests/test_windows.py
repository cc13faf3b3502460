"""Are windows where the published schedules put them, and is the film what its windows say?"""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import small
import torch
from answers import rejected, solution
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fit import peak

import moddiff
from moddiff import capture, checks, hooks, patch
from moddiff.experts import Experts
from moddiff.extensions import windowed
from moddiff.extensions.windows import as_loop, blending, reaching_all, windows
from moddiff.flow import free_noise
from moddiff.hooks import at
from moddiff.rope import angles

PROMPT = "a red circle moving left on a black background"


def slow_schedule(frames, length, overlap, levels, step, ends):
    """The oracle: the rules as ComfyUI's users know them, written down apart from ours, window by window."""
    if frames <= length:
        return [list(range(frames))]
    bits = np.unpackbits(np.array([step], dtype=">u8").view(np.uint8))
    phase = sum(int(bit) / 2 ** (64 - place) for place, bit in enumerate(bits))
    there = []
    for level in range(min(levels, math.ceil(math.log2(frames / length)) + 1)):
        spacing, pad = 2**level, round(frames * phase)
        j = int(phase * spacing) + pad
        while j < frames + pad:
            there.append([(j + i * spacing) % frames for i in range(length)])
            j += length * spacing - overlap
    i = 0
    while ends and i < len(there):
        drops = np.flatnonzero(np.diff(there[i]) < 0)
        if len(drops):
            after, start = there[i][drops[0] + 1], there[i][0]
            flat = [(frame - start) % frames for frame in there[i]]
            there[i] = [frame + frames - 1 - flat[-1] for frame in flat]
            if after not in there[(i + 1) % len(there)]:
                there.insert(i + 1, [*range(after, after + length)])
        i += 1
    unique = []
    for window in there:
        if not ends or window not in unique:
            unique.append(window)
    return unique


def test_the_golden_windows():
    three = [list(range(21)), list(range(17, 38)), list(range(20, 41))]
    assert windows(41, 21, 4, "static") == windows(41, 21, 4, "uniform") == three
    assert windows(9, 21, 4, "looped", step=5) == [list(range(9))]
    assert windows(21, 21, 4, "static") == [list(range(21))]
    # On a ring the last window goes on at the beginning.
    assert windows(41, 21, 4, "looped")[-1] == [*range(34, 41), *range(14)]


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize(
    "sizes",
    [(41, 21, 4), (33, 9, 3), (17, 5, 0), (50, 16, 8), (9, 5, 2), (65, 21, 7), (8, 3, 2), (101, 21, 4)],
)
@pytest.mark.parametrize("schedule", ["uniform", "looped"])
def test_schedules_equal_an_independent_implementation(sizes, step, schedule):
    for levels in (1, 2, 3):
        slow = slow_schedule(*sizes, levels, step, ends=schedule == "uniform")
        if max(map(max, slow)) < sizes[0]:  # else a window of high level is longer than the film
            assert windows(*sizes, schedule, step, levels) == slow


sizes = st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 39))


@settings(deadline=None, max_examples=300)
@given(sizes, st.sampled_from(["static", "uniform", "looped"]), st.integers(0, 60), st.integers(1, 3))
def test_every_frame_is_reached_and_the_windows_have_their_length(sizes, schedule, step, levels):
    frames, length, overlap = sizes[0], sizes[1], min(sizes[2], sizes[1] - 1)
    there = windows(frames, length, overlap, schedule, step, levels)
    assert all(len(window) == min(length, frames) for window in there)
    if levels == 1:
        assert {frame for window in there for frame in window} == set(range(frames))
    assert {f for window in reaching_all(there, frames, length) for f in window} == set(range(frames))
    if schedule == "static":
        assert all(b[0] - a[0] <= length - overlap for a, b in pairwise(there))


@settings(deadline=None, max_examples=300)
@given(
    sizes,
    st.sampled_from(["static", "uniform", "looped"]),
    st.integers(0, 60),
    st.sampled_from(["linear", "pyramid"]),
)
def test_the_weights_of_a_frame_are_one_together(sizes, schedule, step, blend):
    frames, length, overlap = sizes[0], sizes[1], min(sizes[2], sizes[1] - 1)
    there = windows(frames, length, overlap, schedule, step, levels=2)
    there = reaching_all(there, frames, length)
    total = torch.zeros(frames)
    for window, count in zip(there, blending(there, frames, overlap, blend, schedule == "looped")):
        assert len(count) == len(window) and (count > 0).all()
        total.index_add_(0, torch.tensor(window), count)
    torch.testing.assert_close(total, torch.ones(frames))


def test_a_linear_blend_by_hand():
    first, second = blending([[0, 1, 2, 3], [2, 3, 4, 5]], 6, 2)
    torch.testing.assert_close(first, torch.tensor([1, 1, 2 / 3, 1 / 3]))
    torch.testing.assert_close(second, torch.tensor([1 / 3, 2 / 3, 1, 1]))


# ---- a film ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def inputs(dit, frames=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, small.Z, frames, 4, 6, generator=g)
    text = [torch.randn(n, dit.config.text_dim, generator=g) for n in (3, 5)]
    return x, torch.tensor([700.0, 20.0]), text


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["static", "uniform", "looped"])
@pytest.mark.parametrize("blend", ["linear", "pyramid"])
def test_a_film_is_the_mean_of_its_windows(schedule, blend):
    dit, step = small.dit(), 3
    x, t, text = inputs(dit)
    new = windowed(dit, length=3, overlap=1, schedule=schedule, blend=blend)
    with at(step=step, branch="cond"):
        found = new(x, t, new.prepare(text))
    there = windows(7, 3, 1, schedule, step)
    counts = blending(there, 7, 1, blend, schedule == "looped")
    for frame in range(7):
        wanted = 0
        for window, count in zip(there, counts):
            if frame in window:
                place = window.index(frame)
                wanted = wanted + dit(x[:, :, window], t, text)[:, :, place] * count[place]
        torch.testing.assert_close(found[:, :, frame], wanted, atol=1e-5, rtol=1e-5)


def test_one_window_is_the_plain_run_to_the_bit(pipe):
    new = pipe.replace(dit=windowed(pipe.dit, length=3, overlap=1))
    a, b = ([state.next for state in one.steps(PROMPT, seed=1)] for one in (pipe, new))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@torch.no_grad()
def test_pictures_and_the_times_of_tokens_are_cut_with_the_frames():
    dit = small.dit("i2v")
    x, _, text = inputs(dit, frames=5)
    g = torch.Generator().manual_seed(1)
    y = torch.randn(2, small.Z + 4, 5, 4, 6, generator=g)
    image = torch.randn(2, 257, dit.image_dim, generator=g)
    t = torch.rand(2, 5 * 6, generator=g) * 1000
    new = windowed(dit, length=3, overlap=1)
    with at(step=0, branch="cond"):
        found = new(x, t, text, image, y)
    first = dit(x[:, :, :3], t[:, :18], text, image, y[:, :, :3])
    torch.testing.assert_close(found[:, :, :2], first[:, :, :2])
    # The film's picture is the second window's first frame, too.
    pictures = torch.cat([y[:, :, :1], y[:, :, 3:]], 2)
    last = dit(x[:, :, 2:], t[:, 12:], text, image, pictures)
    torch.testing.assert_close(found[:, :, 3:], last[:, :, 1:])
    assert torch.equal(found[:, :, 4], last[:, :, 2])


def test_each_section_of_the_film_reads_its_prompt(pipe):
    others = ["a blue square", "ein roter Kreis"]
    new = pipe.replace(dit=windowed(pipe.dit, length=2, overlap=0, prompts=others, text=pipe.text))
    features = windowed(pipe.dit, length=2, overlap=0, prompts=pipe.text.encode(others))
    a, b = (list(one.steps(PROMPT, seed=0, frames=13))[-1].next for one in (new, pipe.replace(dit=features)))
    assert torch.equal(a, b)
    plain = pipe.replace(dit=windowed(pipe.dit, length=2, overlap=0))
    for prompt, frames in zip(others, (slice(0, 2), slice(2, 4))):
        own = list(plain.steps(prompt, seed=0, frames=13))[-1].next
        torch.testing.assert_close(a[:, :, frames], own[:, :, frames])


def test_a_window_has_a_place_and_taps_see_each(pipe):
    new = pipe.replace(dit=windowed(pipe.dit, length=2, overlap=1))
    with capture(new.dit, "blocks.0.resid_post", branch="cond", steps=1) as seen:
        list(new.steps(PROMPT, seed=0))
    assert [where.window for where, _ in seen] == [(0, 1), (1, 2)]
    rows = [row for row in new.dit.report().rows if row["branch"] == "cond"]
    assert [row["windows"] for row in rows] == [2, 2, 2]

    def only_the_second(x, where):
        return x * 0 if where.window == (1, 2) else x

    with patch(new.dit, "blocks.1.resid_post", only_the_second):
        changed = next(iter(new.steps(PROMPT, seed=0))).velocity
    plain = next(iter(new.steps(PROMPT, seed=0))).velocity
    same = [torch.equal(changed[:, :, i], plain[:, :, i]) for i in range(3)]
    assert same == [True, False, False]


def test_two_experts_see_windows(pipe):
    both = pipe.replace(dit=windowed(Experts(small.dit(), small.dit(seed=1), 0.9), length=2, overlap=1))
    inside = pipe.replace(
        dit=Experts(*(windowed(small.dit(seed=i), length=2, overlap=1) for i in (0, 1)), 0.9)
    )
    a, b = (list(one.steps(PROMPT, seed=0))[-1].next for one in (both, inside))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(length=4, overlap=4), "windowed(overlap=4) is not shorter than the window, length=4"),
        (dict(length=0), "windowed(length=0); expected a whole number of latent frames, from 1 on"),
        (dict(length=2.5), "windowed(length=2.5)"),
        (dict(overlap=-1), "windowed(overlap=-1)"),
        (dict(schedule="moving"), "windowed(schedule='moving'); expected one of static, uniform, looped"),
        (dict(blend="cubic"), "expected one of linear, pyramid"),
        (dict(prompts=[]), "expected a prompt for each section"),
        (dict(prompts=["a", "b"]), "text=pipe.text"),
        (dict(prompts=["a", torch.zeros(2, 16)]), "not both"),
        (dict(prompts=[torch.zeros(2, 17)]), "features of width 17; this dit reads 16"),
        (dict(riflex=5), "windowed(riflex=5); frames have 4 clocks"),
        (dict(riflex=-1), "windowed(riflex=-1)"),
        (dict(stretch=0), "windowed(stretch=0); expected a number above 0"),
    ],
)
def test_wrong_windows_are_refused_at_the_call(how, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        windowed(small.dit(), **how)
    assert hooks.position() == {}


# ---- positions and noise ---------------------------------------------------------------------------------


@torch.no_grad()
def test_other_positions_are_those_of_a_patch_on_the_angles():
    dit = small.dit()
    x, t, text = inputs(dit)
    for how in (dict(riflex=1), dict(stretch=0.5), dict(riflex=1, stretch=0.25)):
        new = windowed(dit, length=7, overlap=0, **how)
        table = angles(
            (7, 2, 3), 16, stretch=(how.get("stretch", 1.0), 1.0, 1.0), riflex=how.get("riflex", 0)
        )
        with patch(dit, "angles", lambda x, where, table=table: table):
            wanted = dit(x, t, text)
        assert torch.equal(new(x, t, text), wanted) and not torch.equal(wanted, dit(x, t, text))


def test_a_dit_with_positions_of_its_own_has_no_other():
    with pytest.raises(ValueError, match="need a dit of ours"):
        windowed(lambda x, t, text: x, riflex=6)


def test_free_noise_repeats_the_frames_of_the_window_before(pipe):
    noise = torch.randn(1, 2, 11, 3, 3, generator=torch.Generator().manual_seed(0))
    new = free_noise(noise, length=4, overlap=1)
    assert torch.equal(new, free_noise(noise, 4, 1)) and torch.equal(new[:, :, :4], noise[:, :, :4])
    for first in range(0, 7, 3):
        before = [new[0, :, first + i] for i in range(3)]
        for i, frame in enumerate(range(first + 4, min(first + 7, 11))):
            assert any(torch.equal(new[0, :, frame], one) for one in before), (first, i)
    full = new[0, :, 4:7].flatten(2).sum((0, 2)).sort().values
    torch.testing.assert_close(full, noise[0, :, :3].flatten(2).sum((0, 2)).sort().values)
    assert torch.equal(free_noise(noise, 11, 4), noise)


def test_the_memory_is_that_of_a_window_however_long_the_film_is():
    """The most live bytes of a pass, counted: beside the film itself they do not grow with it."""
    dit = small.dit()
    new, t, text = windowed(dit, length=3, overlap=1), torch.tensor([500.0]), [torch.randn(4, 16)]
    most = {}
    for part in (dit, new):
        for frames in (9, 33):
            x = torch.randn(1, small.Z, frames, 8, 12)
            most[part, frames] = peak(dit, lambda part=part, x=x: part(x, t, text))
    film = 24 * small.Z * 8 * 12 * 4  # bytes of the 24 frames more
    assert most[new, 33] - most[new, 9] <= 2 * film  # the sum of the windows
    assert most[dit, 33] - most[dit, 9] > 10 * film
    assert most[new, 33] < most[dit, 9]


def test_references_would_be_seen_by_the_first_windows_alone_and_are_refused(tmp_path):
    vace = small.pipeline(tmp_path, "vace")
    new = vace.replace(dit=windowed(vace.dit, length=2, overlap=1))
    new(PROMPT, seed=0, steps=1)
    with pytest.raises(ValueError, match="references= lie in front of the film"):
        new(PROMPT, seed=0, references=[torch.zeros(3, 32, 48)])


def test_a_run_begins_with_free_noise_where_the_dit_sees_windows(pipe):
    new = pipe.replace(dit=windowed(pipe.dit, length=2, overlap=1))
    plain, free = (new.prepare(PROMPT, seed=3, noise=noise).noise for noise in (None, "freenoise"))
    assert torch.equal(free, free_noise(plain, 2, 1)) and not torch.equal(free, plain)
    assert new(PROMPT, noise="freenoise").settings["noise"] == "freenoise"
    with pytest.raises(ValueError, match=re.escape("windowed(dit)")):
        pipe(PROMPT, noise="freenoise")
    with pytest.raises(ValueError, match="expected None or"):
        pipe(PROMPT, noise="blue")


# ---- the exercise ---------------------------------------------------------------------------------------


def test_the_windows_of_the_solution_are_right():
    assert checks.windows(solution("20_windows", "my_windows")).right is True
    assert checks.windows(lambda *film: windows(*film, "static")).right is True
    assert checks.windows(lambda *film: None).right is None


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda f, s, o: [list(range(i, i + s)) for i in range(0, f, s - o)], "is not in the film"),
        (
            lambda f, s, o: [list(range(i, min(i + s, f))) for i in range(0, f - o, s - o)],
            "is shorter than 21",
        ),
        (
            lambda f, s, o: [list(range(i, i + s)) for i in range(0, f - s, s - o)],
            "frame [38] is in no window",
        ),
        (lambda f, s, o: windows(f, s, 0, "static"), "windows step by 17"),
        (lambda f, s, o: [*windows(f, s, o, "static"), list(range(f - s, f))], "may not come twice"),
        (lambda f, s, o: [*range(f)], "expected a list of windows"),
        (lambda f, s, o: windows(f, s, o, "static") if f > 5 else [], "is one window, of all its frames"),
        (lambda f, s, o: windows(f, s, o, "static")[::-1], "not in the order of time"),
        (lambda f, s, o: 1 / 0, "it stopped with ZeroDivision"),
    ],
)
def test_wrong_windows_are_told_their_mistake(wrong, hint):
    rejected(checks.windows(wrong), hint)


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_a_loop_has_as_many_frames_of_each_latent_frame(pipe, frames):
    latent = torch.randn(1, small.Z, frames, 4, 6, generator=torch.Generator().manual_seed(0))
    film = as_loop(pipe, latent)
    assert len(film) == 4 * frames and film.fps == pipe.defaults["fps"]
    if frames == 9:  # what comes before the first frame of the loop is its end
        twice = pipe.decode(torch.cat([latent[:, :, 5:], latent], 2))
        assert np.array_equal(film.frames, twice.frames[13:])


def test_the_end_of_a_loop_leads_into_its_beginning_as_neighbours_do():
    """On the trained model, in pixels: from the last frame to the first, beside the mean between two."""
    pipe = moddiff.load("tiny")
    new = pipe.replace(dit=windowed(pipe.dit, 5, 2, "looped"))
    *_, last = new.steps("a red circle standing still on a black background", seed=0, steps=8, frames=33)

    def seam(film):
        frames = film.frames.astype(float)
        between = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        return np.abs(frames[0] - frames[-1]).mean() / between.mean()

    assert seam(pipe.decode(last.next)) > 2 and seam(as_loop(pipe, last.next)) < 1.25
