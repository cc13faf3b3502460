"""Does our diffusion transformer compute what Diffusers' does, for every kind of Wan model?"""

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moddiff import weights
from moddiff.experts import Experts

TEXT_LEN, CLIP_TOKENS = 512, 257
# kind -> (channels in, channels out); "i2v22" is Wan 2.2's image-to-video, which has no image tokens
KINDS = {
    "t2v": (16, 16),
    "i2v": (36, 16),
    "i2v22": (36, 16),
    "flf2v": (36, 16),
    "ti2v": (48, 48),
    "vace": (16, 16),
}

sizes = st.fixed_dictionaries(
    dict(
        heads=st.integers(1, 4),
        pairs=st.integers(3, 11),
        layers=st.integers(1, 3),
        ffn=st.integers(1, 70),
        text_dim=st.integers(1, 40),
        half_freq=st.integers(1, 30),
        batch=st.integers(1, 3),
        frames=st.integers(1, 5),
        rows=st.integers(1, 4),
        columns=st.integers(1, 5),
        cross_norm=st.booleans(),
        seed=st.integers(0, 99),
    )
)


class Sinusoid(torch.nn.Module):
    """Diffusers computes the timestep's sines in float32, its largest difference to Wan.

    For the oracle they are put right here.
    """

    def __init__(self, width):
        super().__init__()
        self.half = width // 2

    def forward(self, t):
        angle = t.double()[:, None] * torch.exp(
            -torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(self.half) / self.half
        )
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1).float()


def oracle(
    kind, heads=2, pairs=6, layers=2, ffn=40, text_dim=12, half_freq=8, cross_norm=True, image_dim=10, **_
):
    """Diffusers' model with random weights, none of them zero or one."""
    channels_in, channels_out = KINDS[kind]
    more = {}
    if kind in ("i2v", "flf2v"):
        more = dict(
            image_dim=image_dim,
            added_kv_proj_dim=heads * pairs * 2,
            pos_embed_seq_len=2 * CLIP_TOKENS if kind == "flf2v" else None,
        )
    if kind == "vace":
        more = dict(vace_layers=list(range(0, layers, 2)), vace_in_channels=20)
    model = (WanVACETransformer3DModel if kind == "vace" else WanTransformer3DModel)(
        num_attention_heads=heads,
        attention_head_dim=2 * pairs,
        in_channels=channels_in,
        out_channels=channels_out,
        text_dim=text_dim,
        freq_dim=2 * half_freq,
        ffn_dim=ffn,
        num_layers=layers,
        cross_attn_norm=cross_norm,
        **more,
    ).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.condition_embedder.timesteps_proj = Sinusoid(2 * half_freq)
    return model


def ours_of(model):
    """Our DiT from Diffusers' config and names, weights shared."""
    return weights.build("dit", dict(model.config), dict(model.state_dict()))


def inputs(kind, batch=2, frames=3, rows=2, columns=3, text_dim=12, image_dim=10, seed=0, **_):
    """For both: x, t, texts of odd lengths, image features, y, control."""
    torch.manual_seed(seed)
    channels_in, channels_out = KINDS[kind]
    cells = (frames, 2 * rows, 2 * columns)
    t = torch.randint(0, 1001, (batch, frames * rows * columns) if kind == "ti2v" else (batch,)).float()
    lengths = torch.randint(1, 40, (batch,)).tolist()
    return dict(
        x=torch.randn(batch, channels_out, *cells),
        t=t,
        text=[torch.randn(length, text_dim) for length in lengths],
        image=torch.randn(2 * batch if kind == "flf2v" else batch, CLIP_TOKENS, image_dim)
        if kind in ("i2v", "flf2v")
        else None,
        y=torch.randn(batch, channels_in - channels_out, *cells) if channels_in > channels_out else None,
        control=torch.randn(batch, 20, *cells) if kind == "vace" else None,
    )


def run_oracle(model, x, t, text, image=None, y=None, control=None, control_scale=1.0):
    """Diffusers wants all its padding written out and x and y joined."""
    dtype = next(p for n, p in model.named_parameters() if n.startswith("patch_embedding")).dtype
    padded = torch.stack([torch.nn.functional.pad(rows, (0, 0, 0, TEXT_LEN - len(rows))) for rows in text])
    more = {}
    if control is not None:
        more = dict(
            control_hidden_states=control.to(dtype),
            control_hidden_states_scale=control.new_full((len(model.config.vace_layers),), control_scale).to(
                dtype
            ),
        )
    x = x if y is None else torch.cat([x, y], 1)
    image = None if image is None else image.to(dtype)
    return model(
        hidden_states=x.to(dtype),
        timestep=t,
        encoder_hidden_states=padded.to(dtype),
        encoder_hidden_states_image=image,
        return_dict=False,
        **more,
    )[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate]
)  # shrinking takes minutes here
@given(size=sizes)
@torch.no_grad()
def test_velocity_equals_diffusers(kind, size):
    torch.manual_seed(size["seed"])
    theirs = oracle(kind, **size)
    given_ = inputs(kind, **size)
    expected = run_oracle(theirs, **given_)
    assert expected.std() > 0.05
    assert (ours_of(theirs)(**given_) - expected).abs().max() <= 2e-5 * max(1, expected.abs().max())


@torch.no_grad()
def test_the_strength_of_a_control_latent_is_the_one_of_diffusers():
    torch.manual_seed(0)
    theirs = oracle("vace", layers=5)
    ours, given_ = ours_of(theirs), inputs("vace")
    for scale in (0.0, 0.4, 1.7):
        difference = ours(**given_, control_scale=scale) - run_oracle(theirs, **given_, control_scale=scale)
        assert difference.abs().max() <= 2e-5
    assert (ours(**given_) - ours(**given_, control_scale=0.4)).abs().max() > 0.01


@torch.no_grad()
def test_the_two_experts_equal_two_diffusers_models_each_in_its_range():
    torch.manual_seed(0)
    high, low = oracle("t2v"), oracle("t2v")
    ours, given_ = Experts(ours_of(high), ours_of(low), boundary=0.875), inputs("t2v")
    for t, theirs in ((1000.0, high), (875.0, high), (874.9, low), (1.0, low)):
        given_["t"] = torch.full((2,), t)
        assert (ours(**given_) - run_oracle(theirs, **given_)).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v", "vace"])
def test_gradients_of_every_weight_equal_diffusers(kind):
    torch.manual_seed(1)
    theirs = oracle(kind, layers=3)
    ours, given_ = ours_of(theirs), inputs(kind)
    ours(**given_).square().mean().backward()
    run_oracle(theirs, **given_).square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = weights.rename(
        {name: p.grad for name, p in ours.named_parameters()}, "dit", "diffusers", ours.config
    )
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name], atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def bfloat16_errors(kind, seeds=range(2)):
    """How far ours and Diffusers' bfloat16 runs are from the float32 oracle, root mean square.

    The weights are bfloat16 numbers in both.
    """
    off = {"ours": [], "theirs": []}
    for seed in seeds:
        torch.manual_seed(seed)
        theirs = oracle(kind, layers=3)
        for p in theirs.parameters():
            p.data = p.data.bfloat16().float()
        given_ = inputs(kind, seed=seed)
        given_ = {
            name: v
            if v is None or name == "t"
            else [r.bfloat16().float() for r in v]
            if name == "text"
            else v.bfloat16().float()
            for name, v in given_.items()
        }
        with torch.no_grad():
            truth = run_oracle(theirs, **given_)
            off["ours"].append(ours_of(theirs).to(torch.bfloat16)(**given_) - truth)
            for name, p in theirs.named_parameters():  # as from_pretrained does it
                if not any(part in name for part in theirs._keep_in_fp32_modules):
                    p.data = p.data.bfloat16()
            off["theirs"].append(run_oracle(theirs, **given_).float() - truth)
    return {name: torch.cat(errors).square().mean().sqrt().item() for name, errors in off.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_exact_as_diffusers(kind):
    errors = bfloat16_errors(kind)
    print(
        f"\nDiT {kind}: ours {errors['ours']:.5f}, theirs {errors['theirs']:.5f}, ratio "
        f"{errors['ours'] / errors['theirs']:.2f}"
    )
    assert errors["theirs"] > 1e-4
    assert errors["ours"] <= errors["theirs"] * 1.1
