"""What each stage learns from and where it starts, on models small enough for a second."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_stages import shrink, train_all

from moddiff.dit import DiT, DiTConfig
from moddiff.image import ImageConfig, ImageEncoder
from moddiff.text import TextConfig, TextEncoder, Tokenizer
from moddiff.tiny import (
    codec_stages,
    distilling,
    dit_stages,
    encoder_stages,
    shipping,
    stages,
    train,
    training_set,
    world,
)
from moddiff.vae import VAE, VAEConfig


def test_no_training_scene_holds_a_held_out_triple():
    for i in range(3000):
        scene, _ = training_set.training_scene(i)
        assert not any(world.held_out(thing) for thing in scene.things)


def test_the_tokenizer_keeps_the_words_of_the_world_whole_and_spells_the_others(tmp_path):
    text = encoder_stages.train_tokenizer(captions=2000)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer(tmp_path, 64)

    def pieces(prompt):
        return [piece for _, piece in tokenizer.tokens(prompt)]

    assert pieces("a red circle moving left") == ["▁a", "▁red", "▁circle", "▁moving", "▁left", "</s>"]
    scene = world.Scene((world.Thing("circle", "red", "growing"),), "black")
    assert "红色" in pieces(world.caption(scene, "zh"))
    assert pieces("dragon") == ["▁", *"dragon", "</s>"]
    assert len(tokenizer) <= encoder_stages.TEXT_CONFIG["vocab"]
    assert tokenizer.pad == 0 and tokenizer.end == 1


def test_the_vae_starts_as_an_image_model_that_codes_each_frame_alone():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**{**codec_stages.VAE_CONFIG, "dim": 4}))
    codec_stages.start_as_image_model(vae)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        together = vae.encode(video)
        alone = vae.encode(video[:, :, 4:5])
    torch.testing.assert_close(together[:, :, -1:], alone)


def test_latents_are_cached_once_and_a_cache_cut_short_goes_on(tmp_path):
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**{**codec_stages.VAE_CONFIG, "dim": 2})).eval()
    training_set.cache_latents(vae, tmp_path / "a", 3, batch=1)
    training_set.cache_latents(vae, tmp_path / "b", 3, batch=1)
    whole = np.load(tmp_path / "a" / "latents.npy")
    (tmp_path / "b" / "latents.done").write_text("1")
    np.lib.format.open_memmap(tmp_path / "b" / "latents.npy", "r+")[1:] = 0
    training_set.cache_latents(vae, tmp_path / "b", 3, batch=1)
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "latents.npy"), whole)
    assert len(training_set.Latents(tmp_path / "b")) == 3


def test_the_quiz_asks_what_the_caption_says_and_not_what_it_leaves_out():
    scene = world.parse("a red circle moves left")
    background, count, shape, colour, motion, *second = encoder_stages.answers(scene)
    assert background == len(world.BACKGROUNDS) and count == 0
    said = world.SHAPES[shape], list(world.COLOURS)[colour], world.MOTIONS[motion]
    assert said == ("circle", "red", "moving left")
    assert second == [len(world.SHAPES), len(world.COLOURS), len(world.MOTIONS)]


def test_the_i2v_model_starts_as_the_t2v_model(tmp_path, monkeypatch):
    shrink(monkeypatch)
    torch.manual_seed(3)
    t2v = DiT(DiTConfig(**dit_stages.DIT_CONFIG)).eval()
    for folder in ("clips", "firsts"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "latents.npy", np.zeros((2, 16, 5, 12, 12), np.float16))
    towers = (
        TextEncoder(TextConfig(**encoder_stages.TEXT_CONFIG)),
        ImageEncoder(ImageConfig(**encoder_stages.IMAGE_CONFIG)),
    )
    stage = dit_stages.I2VStage(*towers, t2v.state_dict(), tmp_path / "clips", tmp_path / "firsts")
    x, y = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 20, 1, 4, 4)
    text, seen = (
        [torch.randn(3, encoder_stages.TEXT_CONFIG["dim"])],
        torch.randn(1, 5, encoder_stages.IMAGE_CONFIG["dim"]),
    )
    with torch.no_grad():
        expected = t2v(x, torch.tensor([500.0]), text)
        found = stage.model["dit"].eval()(x, torch.tensor([500.0]), text, image=seen, y=y)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_decoder_that_is_sharpened_leaves_its_encoder_alone_and_looks_where_things_are(tmp_path):
    torch.manual_seed(2)
    np.save(tmp_path / "latents.npy", np.zeros((4, 16, 5, 12, 12), np.float16))
    (tmp_path / "latents.done").write_text("4")
    stage = codec_stages.DecoderStage(VAE(VAEConfig(**{**codec_stages.VAE_CONFIG, "dim": 2})), tmp_path)
    trained = {name.split(".")[0] for name, p in stage.model.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "conv2"}
    clip = np.zeros((17, 96, 96, 3), np.uint8)
    clip[:, 72:80, 16:24] = 255  # cell (9, 2)
    corners = [stage.window(clip, np.random.default_rng(i)) for i in range(20)]
    assert {y for y, _ in corners} <= {4, 5, 6} and {x for _, x in corners} <= {0, 1, 2}
    loss, figures = stage.loss(**stage.draw(0, np.random.default_rng(0)))
    assert loss.isfinite() and figures.keys() == {"psnr"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        train_all(folder)
    return folder


@pytest.mark.parametrize("name", stages.STEPS)
def test_a_loss_is_computed_where_its_model_is(name, trained, monkeypatch):
    """On the meta device, which has no values and so refuses both company from the CPU and a look at one."""
    shrink(monkeypatch)
    for module in (codec_stages, dit_stages, distilling):
        monkeypatch.setattr(module, "generator_on", lambda device, seed: None)
    stage = stages.make_stage(name, trained)
    others = (getattr(stage, name, None) for name in ("text", "image", "teacher"))
    for model in (stage.model, *filter(None, others)):
        model.to("meta")

    def draw(step):
        return stage.draw(step, np.random.default_rng([0, step]))

    (drawn,) = training_set.drawn_for(draw, [0], torch.device("meta"))
    loss, figures = stage.loss(**drawn)
    loss.backward()
    assert loss.device.type == "meta" and loss.shape == ()
    assert figures and {figure.device.type for figure in figures.values()} == {"meta"}
    assert {p.grad.device.type for p in stage.model.parameters() if p.grad is not None} == {"meta"}


def test_processes_draw_ahead_what_one_would_draw_in_turn():
    def draw(number):
        return dict(clip=torch.tensor(np.random.default_rng(number).random(3)), number=number)

    alone, ahead = (
        list(training_set.drawn_for(draw, range(5, 12), torch.device("cpu"), processes))
        for processes in (0, 2)
    )
    assert [each["number"] for each in ahead] == list(range(5, 12))
    assert all(torch.equal(a["clip"], b["clip"]) for a, b in zip(alone, ahead))


def test_noise_levels_come_one_from_each_part_and_from_every_shift():
    generator = torch.Generator().manual_seed(0)
    plain = dit_stages.noise_levels(1000, generator, torch.device("cpu"), shifts=(1.0,))
    assert torch.equal(plain, plain.sort().values)
    parts = (torch.special.ndtr(plain.logit()) * 1000).floor()
    assert (parts - torch.arange(1000)).abs().max() <= 1
    mixed = dit_stages.noise_levels(4000, generator, torch.device("cpu"), shifts=(1.0, 9.0))
    for level, share in ((0.5, (0.5 + 0.014) / 2), (0.9, (0.986 + 0.5) / 2)):  # half are of either shift
        assert abs(float((mixed < level).float().mean()) - share) < 0.02


def test_an_i2v_that_is_gone_on_with_begins_with_what_t2v_has_learnt_since(trained, tmp_path, monkeypatch):
    shrink(monkeypatch)
    for place in ("tiny/weights", "weights/presets"):
        (tmp_path / "package" / place).mkdir(parents=True)
    shipping.export(trained, tmp_path / "package")
    shipping.begin_from_shipped(tmp_path / "more", tmp_path / "package")
    train.run_stage("t2v", steps=2, folder=tmp_path / "more", clips=2)
    i2v = load_file(tmp_path / "more" / "i2v" / "ema.safetensors")
    old = load_file(tmp_path / "more" / "t2v" / "start.safetensors")
    new = load_file(tmp_path / "more" / "t2v" / "ema.safetensors")
    for _ in range(2):  # a second call changes nothing
        stages.follow_t2v(tmp_path / "more")
        start = load_file(tmp_path / "more" / "i2v" / "start.safetensors")
        for name in ("dit.blocks.0.ffn.0.weight", "dit.time_mlp.0.bias"):
            torch.testing.assert_close(start[name] - i2v[name], new[name] - old[name], atol=1e-6, rtol=0)
            assert not torch.equal(new[name], old[name])
        patch = "dit.patch_embedding.weight"
        torch.testing.assert_close(
            (start[patch] - i2v[patch])[:, :16], new[patch] - old[patch], atol=1e-6, rtol=0
        )
        assert torch.equal(start[patch][:, 16:], i2v[patch][:, 16:])
    train.run_stage("i2v", steps=1, folder=tmp_path / "more", clips=2)
    before = (tmp_path / "more" / "i2v" / "start.safetensors").read_bytes()
    stages.follow_t2v(tmp_path / "more")  # its own training has begun: no more
    assert (tmp_path / "more" / "i2v" / "start.safetensors").read_bytes() == before
