"""The score command, on stand-ins whose score is known: one draws the truth, one something else."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moddiff.tiny import score, targets, world


class Painter:
    """Stands in for a pipeline: draws what the prompt asks for, or with `spoil`, something near it."""

    def __init__(self, spoil=lambda clip: clip):
        self.spoil, self.calls = spoil, []
        self.vae = SimpleNamespace(encode=lambda video: video, decode=lambda latent: latent)

    def __call__(self, prompt, seed=0, image=None, **settings):
        self.calls.append((prompt, seed))
        clip_seed = seed if image is None else world.stable_seed("i2v", seed)
        return SimpleNamespace(frames=self.spoil(world.clip(world.parse(prompt), clip_seed)))


def test_the_truth_meets_every_target():
    figures = targets.measure(Painter(), Painter(), n=3)
    assert all(
        figures[name] == 1
        for name in figures
        if name.endswith(("_all", "_motion", "_shape", "_colour", "_background"))
    )
    assert figures["vae_psnr"] > 50 and figures["i2v_psnr"] == float("inf")
    assert set(figures) == set(targets.TARGETS)


def test_a_frozen_video_fails_on_motion_alone():
    frozen = Painter(lambda clip: np.repeat(clip[:1], len(clip), 0))
    prompts = world.prompts(12, 1)
    moving = np.mean([scene.things[0].motion != "standing still" for _, scene in prompts])
    verdicts = score.summarise(targets.t2v(frozen, 1, n=12))
    assert (
        verdicts["motion"] == pytest.approx(1 - moving)
        and verdicts["shape"] == verdicts["colour"] == verdicts["background"] == 1
    )


def test_a_first_frame_that_is_not_kept_shows_in_the_psnr():
    grey = Painter(lambda clip: (clip // 2 + 64).astype(np.uint8))
    assert np.mean([psnr for psnr, _ in targets.i2v(grey, n=2)]) < 34


def test_prompts_and_seeds_are_fixed_in_advance_and_held_out():
    first, second = Painter(), Painter()
    targets.t2v(first, 1, n=4)
    targets.t2v(second, 1, n=4)
    assert first.calls == second.calls and [seed for _, seed in first.calls] == [0, 1, 2, 3]
    assert all(world.held_out(world.parse(prompt).things[0]) for prompt, _ in first.calls)


def test_the_table_says_what_is_met_and_what_is_not():
    text = targets.table(dict(one_all=0.981, two_all=0.4, seconds=1.25, vae_psnr=38.49))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()[2:]}
    assert "98.1% | ≥ 98.0% | met" in lines["one object: all four attributes right"]
    assert "40.0% | ≥ 97.0% | not met" in lines["two objects: all seven attributes right"]
    assert "1.25 | ≤ 1.30 | met" in lines["sentence to video, warm, 2 cores, seconds"]
    assert "38.49 | ≥ 38.50 | not met" in lines["VAE reconstruction, mean PSNR of held-out clips, dB"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n=0), "n=0; expected 1 or more prompts"),
        (dict(split="test"), "split='test'; choose 'train', 'heldout' or 'any'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        targets.main(lambda name: pytest.fail("a model was loaded"), **options)


def test_one_model_alone_is_measured_against_its_own_targets(capsys):
    asked = []

    def load(name):
        asked.append(name)
        painter = Painter()
        painter.task = "i2v" if name == "tiny-i2v" else "t2v"
        return painter

    figures = targets.main(load, n=2, model="tiny-fast")
    assert asked == ["tiny-fast"] and "one_all" in figures and not {"i2v_psnr", "vae_psnr"} & set(figures)
    shown = capsys.readouterr().out
    assert "| 100.0% | ≥ 95.0% | met |" in shown and "≤ 0.45" in shown and "VAE" not in shown
    assert set(targets.main(load, n=2, model="tiny-i2v")) == {"i2v_psnr", "i2v_motion"}
    assert "≥ 99.0%" in capsys.readouterr().out


def test_the_record_is_written_whole(tmp_path, capsys):
    targets.main(lambda name: Painter(), n=2, out=tmp_path / "scores.json")
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["n"] == 2 and record["figures"]["one_all"] == 1 and record["torch"] == torch.__version__
    assert "| met |" in capsys.readouterr().out
