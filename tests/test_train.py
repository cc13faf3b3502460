"""The training loop, its optimiser and its stages, on models small enough to train in a second."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moddiff.text import Tokenizer
from moddiff.tiny import stages, train, world
from moddiff.tiny.muon import Muon, optimisers, orthogonalise
from moddiff.vae import VAE, VAEConfig


class Line:
    """A stage that fits a line."""

    name, embeddings, ema, muon_lr, adam_lr = "line", (), 0.9, 0.2, 0.1

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.seen = []

    def loss(self, step, rng):
        x = torch.from_numpy(rng.standard_normal((8, 3))).float()
        self.seen.append((step, float(x[0, 0])))
        loss = (self.model(x) - x[:, :2]).square().mean()
        return loss, dict(error=float(loss.detach()))


def test_a_run_broken_off_and_resumed_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda step, steps: 1.0)
    whole = train.train(Line(), tmp_path / "whole", 12)
    train.train(Line(), tmp_path / "broken", 5)
    second = Line()
    resumed = train.train(second, tmp_path / "broken", 12)
    assert [step for step, _ in second.seen] == list(range(5, 12))
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


TOGETHER = """
import sys
import numpy as np, torch, torch.distributed as dist
from torch import nn
from moddiff.tiny import train

class Three:
    name, embeddings, ema, muon_lr, adam_lr = "three", (), 0.9, 0.02, 0.01
    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))  # three matrices of one shape for two processes
    def of(self, rng):
        x = torch.from_numpy(rng.standard_normal((8, 4))).float()
        return (self.model(x) - x.flip(1)).square().mean()
    def loss(self, step, rng):
        if dist.is_initialized():
            return self.of(rng), {}
        return sum(self.of(np.random.default_rng([0, step, rank])) for rank in (0, 1)) / 2, {}

def work(folder):
    train.train(Three(), folder, 6)

if __name__ == "__main__":
    torch.set_num_threads(1)
    train.together(work, 2, sys.argv[1] + "/two")
    train.train(Three(), sys.argv[1] + "/one", 6)
"""


def test_two_processes_learn_what_one_would_from_both_their_batches(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    subprocess.run([sys.executable, tmp_path / "together.py", tmp_path], check=True, timeout=300)
    one, two = (load_file(tmp_path / name / "three" / "ema.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    stage = Line()
    before = stage.loss(0, np.random.default_rng([0, 999]))[1]["error"]
    train.train(stage, tmp_path, 150)
    assert stage.loss(0, np.random.default_rng([0, 999]))[1]["error"] < 0.05 * before
    rows = list(csv.DictReader(open(tmp_path / "line" / "log.csv")))
    assert {row["figure"] for row in rows} == {"loss", "error"} and int(rows[-1]["step"]) == 150


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")

    def fails(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.replace_file(path, fails)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(tmp_path):
    class Broken(Line):
        def loss(self, step, rng):
            loss, figures = super().loss(step, rng)
            return loss * (float("nan") if step == 3 else 1), figures

    stage = Broken()
    with pytest.raises(FloatingPointError, match="gradient at step 3 is not finite"):
        train.train(stage, tmp_path, 10)
    assert all(p.isfinite().all() for p in stage.model.parameters())


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 5, 5)])
def test_orthogonalise_is_near_the_polar_factor(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    found = torch.linalg.svdvals(orthogonalise(g))
    assert ((found > 0.6) & (found < 1.3)).all()
    assert (
        torch.nn.functional.cosine_similarity(orthogonalise(g).flatten(1), (u @ v).flatten(1)) > 0.95
    ).all()


def test_muon_steps_are_the_same_alone_and_in_a_batch_of_one_shape():
    torch.manual_seed(0)
    pair = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))]
    lone = nn.Parameter(pair[1].detach().clone())
    both, single = Muon(pair, lr=0.1), Muon([lone], lr=0.1)
    for p in pair:
        p.grad = torch.ones_like(p) * torch.arange(6)
    lone.grad = pair[1].grad.clone()
    both.step(), single.step()
    torch.testing.assert_close(pair[1], lone)


def test_matrices_go_to_muon_and_the_rest_to_adam():
    model = nn.ModuleDict(dict(a=nn.Linear(3, 4), token_embedding=nn.Embedding(5, 3), norm=nn.LayerNorm(3)))
    muon, adam = optimisers(model, 0.1, 0.1, ("token_embedding",))
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(4, 3)]
    assert sum(p.numel() for p in adam.param_groups[0]["params"]) == 4 + 15 + 6


def test_no_training_scene_holds_a_held_out_triple():
    for i in range(3000):
        scene, _ = stages.training_scene(i)
        assert not any(world.held_out(thing) for thing in scene.things)


def test_the_tokenizer_keeps_the_words_of_the_world_whole_and_spells_the_others(tmp_path):
    stages.train_tokenizer(tmp_path / "tokenizer.json", captions=2000)
    tokenizer = Tokenizer(tmp_path, 64)
    pieces = lambda prompt: [piece for _, piece in tokenizer.tokens(prompt)]
    assert pieces("a red circle moving left") == ["▁a", "▁red", "▁circle", "▁moving", "▁left", "</s>"]
    assert "红色" in pieces(
        world.caption(world.Scene((world.Thing("circle", "red", "growing"),), "black"), "zh")
    )
    assert pieces("dragon") == ["▁", *"dragon", "</s>"]
    assert len(tokenizer) <= stages.TEXT_CONFIG["vocab"]
    assert tokenizer.pad == 0 and tokenizer.end == 1


def test_the_vae_starts_as_an_image_model_that_codes_each_frame_alone():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**{**stages.VAE_CONFIG, "dim": 4}))
    stages.start_as_image_model(vae)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        together = vae.encode(video)
        alone = vae.encode(video[:, :, 4:5])
    torch.testing.assert_close(together[:, :, -1:], alone)


def test_latents_are_cached_once_and_a_cache_cut_short_goes_on(tmp_path):
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**{**stages.VAE_CONFIG, "dim": 2})).eval()
    stages.cache_latents(vae, tmp_path / "a", 3, batch=1)
    stages.cache_latents(vae, tmp_path / "b", 3, batch=1)
    whole = np.load(tmp_path / "a" / "latents.npy")
    (tmp_path / "b" / "latents.done").write_text("1")
    np.lib.format.open_memmap(tmp_path / "b" / "latents.npy", "r+")[1:] = 0
    stages.cache_latents(vae, tmp_path / "b", 3, batch=1)
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "latents.npy"), whole)
    assert len(stages.Latents(tmp_path / "b")) == 3


def test_a_reader_is_asked_what_the_caption_says_and_not_what_it_leaves_out():
    scene = world.parse("a red circle moves left")
    background, count, shape, colour, motion, *second = stages.answers(scene)
    assert background == len(world.BACKGROUNDS) and count == 0
    assert (world.SHAPES[shape], list(world.COLOURS)[colour], world.MOTIONS[motion]) == (
        "circle",
        "red",
        "moving left",
    )
    assert second == [len(world.SHAPES), len(world.COLOURS), len(world.MOTIONS)]


def small(monkeypatch):
    monkeypatch.setitem(stages.DIT_CONFIG, "num_layers", 1)
    monkeypatch.setitem(stages.I2V_CONFIG, "num_layers", 1)
    monkeypatch.setitem(stages.TEXT_CONFIG, "num_layers", 1)
    monkeypatch.setitem(stages.IMAGE_CONFIG, "num_layers", 2)
    monkeypatch.setitem(stages.VAE_CONFIG, "dim", 2)
    for name in ("VAEStage", "TextStage", "CLIPStage", "T2VStage", "DecoderStage", "I2VStage"):
        init = getattr(stages, name).__init__
        if "batch" in init.__code__.co_varnames[: init.__code__.co_argcount]:
            monkeypatch.setattr(
                getattr(stages, name),
                "__init__",
                lambda self, *a, _init=init, **k: _init(self, *a, **{"batch": 2, **k}),
            )


def test_all_stages_run_in_order_and_export_models_that_load(tmp_path, monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(stages, "measure_latents", lambda folder: dict(mean=[0.5] * 16, std=[2.0] * 16))
    for name in ("vae", "text", "clip", "t2v", "decoder", "i2v"):
        train.run_stage(name, steps=1, folder=tmp_path / "runs", clips=2)
    package = tmp_path / "package"
    (package / "tiny" / "weights").mkdir(parents=True)
    (package / "weights" / "presets").mkdir(parents=True)
    written = train.export(tmp_path / "runs", package)
    assert len(written) == 7
    preset = json.loads((package / "weights" / "presets" / "tiny-i2v.json").read_text())
    assert preset["vae"]["mean"] == [0.5] * 16 and preset["dit"]["in_dim"] == 36
    state = load_file(package / "tiny" / "weights" / "i2v.safetensors")
    assert all(value.dtype == torch.float16 for value in state.values())
    from moddiff.weights import build

    assert build("dit", preset["dit"], state).config.image_dim == stages.IMAGE_CONFIG["dim"]


def test_the_i2v_model_starts_as_the_t2v_model(tmp_path, monkeypatch):
    small(monkeypatch)
    from moddiff.dit import DiT, DiTConfig
    from moddiff.image import ImageConfig, ImageEncoder
    from moddiff.text import TextConfig, TextEncoder

    torch.manual_seed(3)
    t2v = DiT(DiTConfig(**stages.DIT_CONFIG)).eval()
    for folder in ("clips", "firsts"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "latents.npy", np.zeros((2, 16, 5, 12, 12), np.float16))
    towers = TextEncoder(TextConfig(**stages.TEXT_CONFIG)), ImageEncoder(ImageConfig(**stages.IMAGE_CONFIG))
    stage = stages.I2VStage(*towers, t2v.state_dict(), tmp_path / "clips", tmp_path / "firsts")
    x, y = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 20, 1, 4, 4)
    text, seen = [torch.randn(3, stages.TEXT_CONFIG["dim"])], torch.randn(1, 5, stages.IMAGE_CONFIG["dim"])
    with torch.no_grad():
        expected = t2v(x, torch.tensor([500.0]), text)
        found = stage.model["dit"].eval()(x, torch.tensor([500.0]), text, image=seen, y=y)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_stage_and_a_stage_before_its_time_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="'clap' is not one of vae, text, t2v, decoder, clip, i2v"):
        train.run_stage("clap", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="train-tiny --stage vae"):
        train.run_stage("t2v", steps=1, folder=tmp_path, clips=2)


def test_an_export_keeps_the_decoder_that_was_sharpened_later(tmp_path, monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(stages, "measure_latents", lambda folder: dict(mean=[0.0] * 16, std=[1.0] * 16))
    for name in ("vae", "text", "t2v", "decoder"):
        train.run_stage(name, steps=1, folder=tmp_path, clips=2)
    before, after = stages.part(tmp_path, "vae"), stages.part(tmp_path, "decoder")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"decoder", "conv2"} and "decoder" in changed


def test_shipped_weights_can_be_gone_on_from(tmp_path, monkeypatch):
    """export, then begin_from_shipped in another folder: the next stage starts at the shipped weights, half precision and all."""
    small(monkeypatch)
    monkeypatch.setattr(stages, "measure_latents", lambda folder: dict(mean=[0.5] * 16, std=[2.0] * 16))
    for name in ("vae", "text", "clip", "t2v", "decoder", "i2v"):
        train.run_stage(name, steps=1, folder=tmp_path / "first", clips=2)
    package = tmp_path / "package"
    (package / "tiny" / "weights").mkdir(parents=True)
    (package / "weights" / "presets").mkdir(parents=True)
    train.export(tmp_path / "first", package)
    train.begin_from_shipped(tmp_path / "second", package)
    shipped = stages.part(tmp_path / "first", "i2v", "dit")
    for name, value in stages.part(tmp_path / "second", "i2v", "dit").items():
        torch.testing.assert_close(value, shipped[name].half().float(), rtol=0, atol=0)
    assert stages.config_of("vae", tmp_path / "second")["std"] == [2.0] * 16
    begins = {}
    monkeypatch.setattr(
        stages.T2VStage,
        "loss",
        lambda self, step, rng: (
            begins.setdefault("dit", {k: v.clone() for k, v in self.model["dit"].state_dict().items()})
            and 0 * next(self.model.parameters()).sum(),
            {},
        ),
    )
    train.run_stage("t2v", steps=1, folder=tmp_path / "second", clips=2)
    for name, value in stages.part(tmp_path / "first", "t2v", "dit").items():
        torch.testing.assert_close(begins["dit"][name], value.half().float(), rtol=0, atol=0)
    with pytest.raises(FileExistsError, match="second is not empty"):
        train.begin_from_shipped(tmp_path / "second", package)
    (package / "tiny" / "weights" / "image.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="image.safetensors not in tiny/weights"):
        train.begin_from_shipped(tmp_path / "third", package)
    assert not (tmp_path / "third").exists()


def test_half_of_what_the_decoder_learns_from_is_what_the_guided_dit_returns(tmp_path):
    """A DiT that knows the truth returns the clean latent; one that says nothing returns what was noised."""
    torch.manual_seed(2)
    clean = torch.randn(4, 16, 5, 12, 12).half().float()
    np.save(tmp_path / "latents.npy", clean.numpy().astype(np.float16))
    (tmp_path / "latents.done").write_text("4")
    picks, heard = np.array([1, 3]), []

    class Knows:
        def __call__(self, x, t, text):
            assert torch.equal(x[:2], x[2:]) and torch.equal(t[:2], t[2:])
            heard.extend(text)
            s = t.view(-1, 1, 1, 1, 1) / 1000
            return (
                x - clean[np.tile(picks, 2)]
            ) / s  # the velocity from x down to the clean latent: noise - z0

    class Says:
        def encode(self, captions):
            return captions

    stage = stages.DecoderStage(
        VAE(VAEConfig(**{**stages.VAE_CONFIG, "dim": 2})), tmp_path, (Says(), Knows())
    )
    found = stage.returned(picks, np.random.default_rng(0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, clean[picks], atol=1e-4, rtol=0)
    assert heard[2:] == ["", ""] and all(heard[:2])
    stage.towers = Says(), lambda x, t, text: torch.zeros_like(x)
    apart = (
        (stage.returned(picks, np.random.default_rng(0), torch.Generator().manual_seed(0)) - clean[picks])
        .square()
        .mean((1, 2, 3, 4))
        .sqrt()
    )
    assert (apart > 0.04).all() and (apart < 0.8).all()


@pytest.mark.parametrize("pays", [False, True])
def test_orthogonalise_and_a_stage_work_in_either_precision(tmp_path, monkeypatch, pays):
    """Machines with and without fast bfloat16 must both train: same weights' type, finite loss, nearly the same step."""
    from moddiff.tiny import muon

    for module in (muon, stages):
        monkeypatch.setattr(module, "half_pays", lambda: pays)
    g = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    found = muon.orthogonalise(g)
    assert found.dtype == torch.float32
    singular = torch.linalg.svdvals(found)
    assert ((singular > 0.6) & (singular < 1.3)).all()
    stage = stages.VAEStage(frame_steps=10)
    loss, _ = stage.loss(0, np.random.default_rng(0))
    loss.backward()
    assert loss.dtype == torch.float32 and all(
        p.grad is None or p.grad.dtype == torch.float32 for p in stage.model.parameters()
    )
    monkeypatch.setattr(stages, "half_pays", lambda: False)
    reference, _ = stage.loss(0, np.random.default_rng(0))
    assert abs(float(loss.detach() - reference.detach())) < 0.02 * float(reference.detach())
