"""The loop against the pipelines of diffusers: same weights, noise, prompts and pictures, equal latents."""

import diffusers_grids
import numpy as np
import pytest
import small
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image

from moddiff import flow, weights
from moddiff.experts import Experts
from moddiff.solvers import UniPC

PROMPT, NEGATIVE = "a red circle moving left", "a star"
HEIGHT, WIDTH = small.SIZE


@pytest.fixture(autouse=True)
def their_grid(monkeypatch):
    monkeypatch.setitem(flow.GRIDS, OnTheirGrid.grid, diffusers_grids.unipc)


class OnTheirGrid(UniPC):
    grid = "diffusers-unipc"


def scheduler(shift):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )


def their_dit(ours):
    c = ours.config
    image = dict(
        image_dim=c.image_dim,
        added_kv_proj_dim=c.dim if c.image_dim else None,
        pos_embed_seq_len=514 if c.model_type == "flf2v" else None,
    )
    vace = dict(vace_layers=list(c.vace_layers), vace_in_channels=c.vace_in_dim) if c.vace_layers else {}
    make = WanVACETransformer3DModel if vace else WanTransformer3DModel
    theirs = make(
        patch_size=c.patch_size,
        num_attention_heads=c.num_heads,
        attention_head_dim=c.dim // c.num_heads,
        in_channels=c.in_dim,
        out_channels=c.out_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        eps=c.eps,
        **image,
        **vace,
    ).eval()
    theirs.load_state_dict(weights.rename(ours.state_dict(), "dit", "diffusers", c), strict=True)
    return theirs


def their_vae(ours):
    c = ours.config
    theirs = AutoencoderKLWan(
        base_dim=c.dim,
        z_dim=c.z_dim,
        dim_mult=list(c.dim_mult),
        num_res_blocks=c.num_res_blocks,
        temperal_downsample=list(c.temperal_downsample),
        latents_mean=list(c.mean),
        latents_std=list(c.std),
    ).eval()
    theirs.load_state_dict(weights.rename(ours.state_dict(), "vae", "diffusers", c), strict=True)
    return theirs


def padded(pipe, prompt):
    text = pipe.text.encode([prompt])[0]
    return torch.cat([text, text.new_zeros(pipe.dit.config.text_len - len(text), text.shape[1])])[None]


def both(
    pipe, make, steps=5, shift=3.0, scale=4.0, theirs=(), scale_theirs=None, build=(), features=None, **ours
):
    """(our last latent, theirs), from the same noise.

    `features` stand for the CLIP tower, whose preprocessing differs there.
    """
    dits = [
        their_dit(dit)
        for dit in ((pipe.dit.high, pipe.dit.low) if isinstance(pipe.dit, Experts) else (pipe.dit,))
    ]
    experts = dict(transformer_2=dits[1], boundary_ratio=pipe.dit.boundary) if len(dits) == 2 else {}
    other = make(
        tokenizer=None,
        text_encoder=None,
        vae=their_vae(pipe.vae),
        scheduler=scheduler(shift),
        transformer=dits[0],
        **experts,
        **dict(build),
    )
    other.set_progress_bar_config(disable=True)
    if features is not None:
        other.encode_image = lambda *_: features
    options = dict(
        negative=NEGATIVE, seed=7, steps=steps, shift=shift, scale=scale, solver=OnTheirGrid(), **ours
    )
    noise = pipe.prepare(PROMPT, **options).noise
    *_, last = pipe.steps(PROMPT, **options)
    given = dict(
        prompt_embeds=padded(pipe, PROMPT),
        negative_prompt_embeds=padded(pipe, NEGATIVE),
        latents=noise.clone(),
        height=HEIGHT,
        width=WIDTH,
        num_frames=small.FRAMES,
        num_inference_steps=steps,
        output_type="latent",
        **(scale_theirs or dict(guidance_scale=scale)),
    )
    return last.next, other(**given, **dict(theirs)).frames, other


def close(ours, theirs):
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def test_text_to_video_is_that_of_diffusers(tmp_path):
    pipe = small.pipeline(tmp_path)
    ours, theirs, other = both(pipe, WanPipeline)
    close(ours, theirs)
    frames = pipe.decode(ours).frames
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.mean, pipe.vae.config.std))
    with torch.no_grad():
        pixels = (other.vae.decode(ours * std + mean).sample.clamp(-1, 1) + 1) / 2 * 255
    assert (
        np.abs(frames - pixels[0].permute(1, 2, 3, 0).numpy()).max() < 1.01
    )  # ours are cut to whole numbers


@pytest.mark.parametrize("clip", [True, False])
def test_image_to_video_is_that_of_diffusers_with_clip_and_without(tmp_path, clip):
    pipe = small.pipeline(
        tmp_path, "i2v", clip, dit=small.dit("i2v", clip, text_len=512)
    )  # diffusers takes the last 512 tokens for the text
    image = picture(0)
    features = pipe.prepare(PROMPT, image=image).extra.image
    assert (features is not None) == clip
    ours, theirs, _ = both(
        pipe, WanImageToVideoPipeline, theirs=dict(image=image), features=features, image=image
    )
    close(ours, theirs)


def test_first_and_last_frame_to_video_is_that_of_diffusers(tmp_path):
    pipe = small.pipeline(tmp_path, "flf2v", dit=small.dit("flf2v", text_len=512))
    first, last = picture(0), picture(1)
    features = pipe.prepare(PROMPT, image=first, last_image=last).extra.image
    ours, theirs, _ = both(
        pipe,
        WanImageToVideoPipeline,
        theirs=dict(image=first, last_image=last),
        features=features,
        image=first,
        last_image=last,
    )
    close(ours, theirs)


@pytest.mark.parametrize("with_picture", [True, False])
def test_a_held_first_frame_is_that_of_diffusers(tmp_path, with_picture):
    pipe = small.pipeline(tmp_path, "ti2v")
    image = picture(0)
    ours, theirs, _ = both(
        pipe,
        WanImageToVideoPipeline if with_picture else WanPipeline,
        build=dict(expand_timesteps=True),
        theirs=dict(image=image) if with_picture else {},
        **(dict(image=image) if with_picture else {}),
    )
    close(ours, theirs)


def test_two_experts_with_a_scale_each_are_those_of_diffusers(tmp_path):
    experts = Experts(small.dit(seed=0), small.dit(seed=5), boundary=0.875)
    pipe = small.pipeline(tmp_path, dit=experts, task="t2v")
    ours, theirs, _ = both(
        pipe, WanPipeline, scale=(3.0, 5.0), scale_theirs=dict(guidance_scale=5.0, guidance_scale_2=3.0)
    )
    close(ours, theirs)
    ours_equal, _, _ = both(
        pipe, WanPipeline, scale=5.0, scale_theirs=dict(guidance_scale=5.0, guidance_scale_2=5.0)
    )
    assert (ours - ours_equal).abs().max() > 1e-3


@pytest.mark.parametrize("references", [0, 1])
def test_vace_is_that_of_diffusers(tmp_path, references):
    pipe = small.pipeline(tmp_path, "vace")
    frames = [picture(i) for i in range(small.FRAMES)]
    keep = np.zeros((small.FRAMES, HEIGHT, WIDTH), np.uint8)
    keep[2:, :, WIDTH // 2 :] = 255
    video = torch.tensor(np.stack(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    seen = [picture(99)] * references
    ours, theirs, _ = both(
        pipe,
        WanVACEPipeline,
        theirs=dict(video=frames, mask=[Image.fromarray(m) for m in keep], reference_images=seen or None),
        video=video,
        mask=keep / 255,
        references=seen,
    )
    close(ours, theirs)
    assert len(pipe(PROMPT, steps=2, video=video, mask=keep / 255, references=seen)) == small.FRAMES
