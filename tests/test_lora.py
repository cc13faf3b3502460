"""Do adapters of every family and spelling change the model as those who wrote the files meant it?"""

import json
import logging
import math
import warnings

import lycoris
import peft
import pytest
import small
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from moddiff import hooks, weights
from moddiff.contracts import ContractError
from moddiff.experts import Experts
from moddiff.extensions import adapted, layers
from moddiff.hooks import at, capture, taps
from moddiff.linear import Linear, dense, store
from moddiff.settings import Note
from moddiff.storage import Scaled
from moddiff.text import TextConfig, TextEncoder
from moddiff.weights.building import WeightsError
from moddiff.weights.names import counterparts

SIZES = dict(dim=36, ffn_dim=50, text_dim=11, num_layers=2)  # odd ones: nothing fits by accident


@pytest.fixture(scope="module")
def dit():
    return small.dit(**SIZES).requires_grad_(False)


@pytest.fixture(scope="module")
def image_dit():
    return small.dit("i2v", **SIZES).requires_grad_(False)


def run(dit, t=700.0, text=None, **rest):
    g = torch.Generator().manual_seed(1)
    c = dit.config
    x = torch.randn(1, c.out_dim, 2, 4, 6, generator=g)
    text = [torch.randn(5, c.text_dim, generator=g)] if text is None else text
    if c.in_dim != c.out_dim:
        rest["y"] = torch.randn(1, c.in_dim - c.out_dim, 2, 4, 6, generator=g)
        rest["image"] = torch.randn(1, 257, c.image_dim, generator=g)
    with torch.no_grad():
        return dit(x, torch.tensor([t]), text, **rest)


def close(a, b, tolerance=2e-5):
    difference = float((a - b).abs().max() / b.abs().max())
    assert difference <= tolerance


def official(layer):
    """What the official code calls one of our layers."""
    return counterparts("dit", OFFICIAL_CONFIG, [f"{layer}.weight"], "official")[f"{layer}.weight"].names[0][
        :-7
    ]


OFFICIAL_CONFIG = small.dit("i2v", **SIZES).config
BLOCK = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "cross_attn.q", "cross_attn.k",
         "cross_attn.v", "cross_attn.out", "ffn.0", "ffn.2"]  # fmt: skip
BLOCKS = [f"blocks.{i}.{name}" for i in range(2) for name in BLOCK]
AROUND = ["text_mlp.0", "text_mlp.2", "time_mlp.0", "time_mlp.2", "time_projection.1", "final.linear"]


def random_lora(dit, names, rank=3, alpha=None, seed=0, spell=official, down="lora_down", up="lora_up"):
    """A file of random LoRAs, and the changes it means."""
    g, state, deltas = torch.Generator().manual_seed(seed), {}, {}
    for name in names:
        rows, columns = dit.get_submodule(name).weight.shape[:2]
        a, b = torch.randn(rank, columns, generator=g) / 4, torch.randn(rows, rank, generator=g) / 4
        there = spell(name)
        state[f"{there}.{down}.weight"], state[f"{there}.{up}.weight"] = a, b
        if alpha is not None:
            state[f"{there}.alpha"] = torch.tensor(float(alpha))
        deltas[name] = (1 if alpha is None else alpha / rank) * b @ a
    return state, deltas


def with_deltas(dit, deltas, strength=1.0):
    """The oracle: another DiT, with the sums in its weights."""
    state = {name: x.clone() for name, x in dit.state_dict().items()}
    for name, delta in deltas.items():
        state[name if name in state else f"{name}.weight"] += strength * delta
    return weights.build("dit", dit.config, state).requires_grad_(False)


# Run time, merged, strength.


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.3, -2])
def test_a_lora_is_added_to_every_layer_it_names(dit, merge, strength):
    state, deltas = random_lora(dit, BLOCKS + AROUND, alpha=1.5)
    new = adapted(dit, state, strength=strength, merge=merge)
    close(run(new), run(with_deltas(dit, deltas, strength)))
    assert not torch.allclose(run(new), run(dit), atol=1e-3)
    assert new.report().rows[0] == {
        "layer": "blocks.0.self_attn.q",
        "status": "matched",
        "family": "LoRA",
        "rank": 3,
        "alpha": 1.5,
        "strength": strength,
        "file": "the state",
        "key": "blocks.0.self_attn.q",
    }
    assert len(new.report()) == len(BLOCKS + AROUND)
    assert hasattr(new.blocks[0].ffn[0], "changes") != merge


def test_strength_0_is_the_plain_model_to_the_bit(dit):
    state, _ = random_lora(dit, BLOCKS, alpha=2)
    state |= {"blocks.0.diff_m": torch.randn(1, 6, 36), "blocks.1.norm3.diff": torch.randn(36)}
    assert torch.equal(run(adapted(dit, state, strength=0)), run(dit))
    assert torch.equal(run(adapted(dit, state, strength=lambda where: 0)), run(dit))
    assert torch.equal(run(adapted(dit, state, strength=0, merge=True)), run(dit))


def test_several_files_add_up_in_one_call_or_in_turn(dit):
    (one, first), (two, second) = (
        random_lora(dit, BLOCKS, alpha=3),
        random_lora(dit, BLOCKS[3:], rank=2, seed=5, alpha=1),
    )
    expected = {name: 0.5 * first[name] - second.get(name, 0) for name in first}
    close(run(adapted(dit, one, two, strength=[0.5, -1])), run(with_deltas(dit, expected)))
    close(run(adapted(adapted(dit, one, strength=0.5), two, strength=-1)), run(with_deltas(dit, expected)))
    close(
        run(adapted(adapted(dit, one, strength=0.5, merge=True), two, strength=-1)),
        run(with_deltas(dit, expected)),
    )


def test_one_strength_in_a_list_is_for_every_file_and_for_a_fresh_adapter(dit):
    (one, _), (two, _) = random_lora(dit, BLOCKS, alpha=3), random_lora(dit, BLOCKS, seed=5, alpha=1)
    assert torch.equal(run(adapted(dit, one, two, strength=[0.5])), run(adapted(dit, one, two, strength=0.5)))
    assert torch.equal(run(adapted(dit, rank=2, strength=[0.5])), run(dit))


def test_a_strength_may_change_from_step_to_step_with_the_keys_and_values_of_the_text(dit):
    """What a step reads of the text is made by adapted layers, too, so it cannot be made once per prompt."""
    state, deltas = random_lora(dit, BLOCKS, alpha=3)
    new = adapted(dit, state, strength=lambda where: 0.25 * where.step)
    text = [torch.randn(5, 11, generator=torch.Generator().manual_seed(2))]
    prepared = new.prepare(text)
    for step in range(3):
        with at(step=step, branch="cond"):
            close(run(new, text=prepared), run(with_deltas(dit, deltas, 0.25 * step), text=text))
    blocks = adapted(dit, state, strength=lambda where: float(where.path == "blocks.1.ffn.0"))
    close(run(blocks), run(with_deltas(dit, {"blocks.1.ffn.0": deltas["blocks.1.ffn.0"]})))


def test_a_strength_that_is_no_number_is_refused(dit):
    state, _ = random_lora(dit, BLOCKS, alpha=3)
    for strength in ("1", None, math.nan, [1.0, 2.0], {"high": 1}):
        with pytest.raises(ValueError, match="strength"):
            adapted(dit, state, strength=strength)
    with pytest.raises(TypeError, match="strength= gave None for blocks.0.* expected a finite number"):
        run(adapted(dit, state, strength=lambda where: None))
    with pytest.raises(ValueError, match="merge=True adds the change once"):
        adapted(dit, state, strength=lambda where: 1, merge=True)


def test_each_expert_has_its_own_file_and_strength(dit):
    other = small.dit(seed=3, **SIZES).requires_grad_(False)
    both = Experts(dit, other, 0.5)
    (high, first), (low, second) = (
        random_lora(dit, BLOCKS, alpha=3),
        random_lora(dit, BLOCKS, seed=7, alpha=3),
    )
    new = adapted(both, {"high": high, "low": low}, strength={"high": 0.5, "low": 2})
    close(run(new, 900.0), run(with_deltas(dit, first, 0.5), 900.0))
    close(run(new, 100.0), run(with_deltas(other, second, 2), 100.0))
    only = adapted(both, {"low": low})
    assert torch.equal(run(only, 900.0), run(dit, 900.0))
    close(run(only, 100.0), run(with_deltas(other, second), 100.0))
    close(run(adapted(both, low), 900.0), run(with_deltas(dit, second), 900.0))
    by_expert = adapted(both, low, strength=lambda where: 0.0 if where.expert == "high" else 1.0)
    assert torch.equal(run(by_expert, 900.0), run(dit, 900.0))
    close(run(by_expert, 100.0), run(with_deltas(other, second), 100.0))
    assert new.report().rows[0]["layer"] == "high.blocks.0.self_attn.q"
    with pytest.raises(ValueError, match="files for 'high', but this component has no experts"):
        adapted(dit, {"high": high})
    with pytest.raises(
        ValueError, match="strength for 'high', 'mid', but this component has the experts high and low"
    ):
        adapted(both, low, strength={"high": 1, "mid": 1})


def test_a_file_with_both_experts_is_split_between_them(dit):
    both = Experts(dit, small.dit(seed=3, **SIZES).requires_grad_(False), 0.5)

    def spelt_with(before):
        return lambda layer: before + diffusers_name(layer)

    (high, first), (low, second) = (
        random_lora(dit, BLOCKS, seed=seed, spell=spelt_with(before))
        for seed, before in ((0, "transformer."), (7, "transformer_2."))
    )
    new = adapted(both, high | low)
    assert all(row["status"] == "matched" for row in new.report()) and len(new.report()) == 2 * len(BLOCKS)
    close(run(new, 900.0), run(with_deltas(dit, first), 900.0))
    close(run(new, 100.0), run(with_deltas(both.low, second), 100.0))


def test_weights_of_any_storage_take_an_adapter(dit):
    """Beside the weights, the change does not care how they are kept; into them it cannot go."""
    state, deltas = random_lora(dit, BLOCKS, alpha=3)
    kept = weights.build("dit", dit.config, dit.state_dict()).requires_grad_(False)
    for layer in layers(kept, Linear).values():
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        store(layer, Scaled((layer.weight / scale).round().to(torch.int8), scale, torch.float32))
    expanded = {f"{path}.weight": dense(layer) for path, layer in layers(kept, Linear).items()}
    plain = weights.build("dit", dit.config, dit.state_dict() | expanded)
    close(run(adapted(kept, state)), run(with_deltas(plain, deltas)))
    with pytest.raises(
        ValueError, match="blocks.0.self_attn.q is kept as Scaled.*merge first.*or leave merge out"
    ):
        adapted(kept, state, merge=True)


def test_a_bf16_model_stays_bf16(dit):
    state, deltas = random_lora(dit, BLOCKS, alpha=3)
    half = weights.build("dit", dit.config, dit.state_dict(), dtype="bf16")
    new = adapted(half, state)
    assert new.blocks[0].ffn[0](torch.randn(2, 36)).dtype == torch.bfloat16
    close(run(new), run(with_deltas(dit, deltas)), 0.08)
    merged = adapted(half, state, merge=True)
    assert merged.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    close(run(merged), run(with_deltas(dit, deltas)), 0.08)


def test_taps_and_patches_stay(dit):
    state, _ = random_lora(dit, BLOCKS, alpha=3)
    new = adapted(dit, state)
    assert taps(new).names == taps(dit).names
    with capture(new, "blocks.1.cross_attn.probs") as seen:
        run(new)
    assert len(seen) == 1
    with hooks.patch(new, "blocks.*.resid_post", lambda x, where: 0 * x):
        assert not torch.equal(run(new), run(dit))


# The oracles.


class Shell(nn.Module):
    """The linear layers of a DiT under their official names: what peft and LyCORIS adapt."""

    def __init__(self, dit, names):
        super().__init__()
        for name in names:
            *path, last = official(name).split(".")
            owner = self
            for piece in path:
                if piece not in owner._modules:
                    owner.add_module(piece, nn.Module())
                owner = owner._modules[piece]
            theirs = nn.Linear(*dit.get_submodule(name).weight.shape[::-1])
            theirs.load_state_dict(dit.get_submodule(name).state_dict())
            owner.add_module(last, theirs)

    def state(self, names):
        """Our names of the weights and biases."""
        return {
            f"{name}.{leaf}": x.detach().clone()
            for name in names
            for leaf, x in self.get_submodule(official(name)).state_dict().items()
        }


def shaken(module, seed=0):
    """Random numbers in every parameter of an adapter, which begins with zeros."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if "lora_" in name or "lokr" in name or "hada" in name or "dora" in name:
            p.data += torch.randn(p.shape, generator=g) / 5
    return module


@pytest.mark.parametrize(
    "how",
    [
        dict(r=3, lora_alpha=5),
        dict(r=4, lora_alpha=2, use_rslora=True),
        dict(r=3, lora_alpha=4, use_dora=True),
        dict(r=2, lora_alpha=4, lora_bias=True),
        dict(r=3, lora_alpha=5, alpha_pattern={"blocks.1.ffn.0": 11}),
    ],
    ids=str,
)
@pytest.mark.parametrize("merge", [False, True])
def test_as_peft(dit, tmp_path, how, merge):
    shell = Shell(dit, BLOCKS)
    config = peft.LoraConfig(target_modules=[official(name) for name in BLOCKS], **how)
    theirs = shaken(peft.get_peft_model(shell, config))
    theirs.save_pretrained(tmp_path)
    merged = theirs.merge_and_unload()
    expected = weights.build("dit", dit.config, dit.state_dict() | merged.state(BLOCKS)).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = adapted(dit, tmp_path, merge=merge)
    close(run(new), run(expected), 5e-5)
    assert new.report().rows[0]["family"] == ("DoRA on LoRA" if how.get("use_dora") else "LoRA")


LYCORIS = [
    dict(algo="loha"),
    dict(algo="lokr", factor=2),
    dict(algo="lokr", factor=-1),
    dict(algo="lokr", factor=2, decompose_both=True),
    dict(algo="lokr", factor=3, full_matrix=True),
    dict(algo="locon"),
    dict(algo="loha", dora_wd=True),
    dict(algo="lokr", factor=2, dora_wd=True),
    dict(algo="locon", dora_wd=True, wd_on_output=False),
    dict(algo="locon", dora_wd=True, wd_on_output=True),
]


@pytest.mark.parametrize("how", LYCORIS, ids=str)
def test_as_lycoris(dit, how):
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    names = [*BLOCKS, "text_mlp.2"]
    shell = Shell(dit, names)
    net = lycoris.create_lycoris(shell, 1.0, linear_dim=3, linear_alpha=2.0, **how)
    net.apply_to()
    state = {key: x.detach().clone() for key, x in shaken(net).state_dict().items()}
    # Its forward is what was trained; merge_to of 4.1.3 multiplies LoHa and LoKr by alpha / rank twice.
    whole = dit.state_dict()
    for name in names:
        layer = shell.get_submodule(official(name))
        with torch.no_grad():
            whole[f"{name}.weight"] = (layer(torch.eye(layer.in_features)) - layer.bias).T
    expected = weights.build("dit", dit.config, whole).requires_grad_(False)
    new = adapted(dit, state)
    close(run(new), run(expected), 5e-5)
    close(run(adapted(dit, state, merge=True)), run(expected), 5e-5)
    assert all(row["status"] == "matched" for row in new.report().rows)


def test_a_convolution_takes_lora_loha_and_lokr_with_and_without_a_core(dit):
    """The patch embedding; formulas by hand, as LyCORIS writes them."""
    g, weight = torch.Generator().manual_seed(0), dit.patch_embedding.weight
    out, channels, *kernel = weight.shape

    def draw(*shape):
        return torch.randn(*shape, generator=g) / 3

    a, b, core = draw(3, channels, 1, 1, 1), draw(out, 3, 1, 1, 1), draw(3, 3, *kernel)
    flat = draw(3, channels, *kernel)
    files = {
        "lora": (
            {"lora_down.weight": flat, "lora_up.weight": b},
            (b.flatten(1) @ flat.flatten(1)).view(weight.shape),
        ),
        "lora with a core": (
            {"lora_down.weight": a, "lora_up.weight": b, "lora_mid.weight": core},
            torch.einsum("op,pqtyx,qi->oityx", b.flatten(1), core, a.flatten(1)),
        ),
        "difference": ({"diff": core[:, :1].new_ones(weight.shape)}, torch.ones(weight.shape)),
    }
    w1a, w1b, w2a, w2b = draw(3, out), draw(3, channels), draw(3, out), draw(3, channels)
    core2 = draw(3, 3, *kernel)
    whole = [torch.einsum("ijtyx,jr,ip->prtyx", t, v, u) for t, u, v in ((core, w1a, w1b), (core2, w2a, w2b))]
    files["loha with cores"] = (
        {
            "hada_w1_a": w1a,
            "hada_w1_b": w1b,
            "hada_w2_a": w2a,
            "hada_w2_b": w2b,
            "hada_t1": core,
            "hada_t2": core2,
        },
        whole[0] * whole[1],
    )
    w1, w2 = draw(6, 2), draw(out // 6, channels // 2, *kernel)
    kron = torch.stack(
        [
            torch.kron(w1, w2[:, :, t, y, x])
            for t in range(kernel[0])
            for y in range(kernel[1])
            for x in range(kernel[2])
        ],
        -1,
    )
    files["lokr"] = ({"lokr_w1": w1, "lokr_w2": w2}, kron.view(weight.shape))
    for name, (state, delta) in files.items():
        state = {f"diffusion_model.patch_embedding.{part}": x for part, x in state.items()}
        state["diffusion_model.patch_embedding.alpha"] = torch.tensor(3.0)
        for merge in (False, True):
            new = adapted(dit, state, merge=merge)
            close(run(new), run(with_deltas(dit, {"patch_embedding": delta}))), name


def test_dora_of_a_convolution_and_whatever_axis(dit):
    weight = dit.patch_embedding.weight
    state = {
        "patch_embedding.diff": 0.1 * torch.ones_like(weight),
        "patch_embedding.dora_scale": torch.full((36, 1, 1, 1, 1), 2.0),
    }
    whole = weight + 0.1
    expected = 2 * whole / whole.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    close(run(adapted(dit, state)), run(with_deltas(dit, {"patch_embedding": expected - weight})))


def diffusers_dit(dit):
    """Diffusers' model with the same weights."""
    c = dit.config
    theirs = WanTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.dim // c.num_heads,
        in_channels=c.in_dim,
        out_channels=c.out_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
    )
    theirs.load_state_dict(weights.rename(dit.state_dict(), "dit", "diffusers", c))
    return theirs.eval()


def diffusers_result(theirs, config):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, config.out_dim, 2, 4, 6, generator=g)
    text = torch.zeros(1, config.text_len, config.text_dim)
    text[0, :5] = torch.randn(5, config.text_dim, generator=g)
    with torch.no_grad():
        return theirs(x, torch.tensor([700]), text, return_dict=False)[0]


@pytest.mark.parametrize("style", ["official", "diffusers", "kohya"])
def test_diffusers_reads_what_we_write_and_we_read_it_back(dit, tmp_path, style):
    new = shaken(adapted(dit, rank=3, alpha=2))
    for one in new.applied:
        one.change.up.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(one.where.path)))
    new.save(tmp_path / "mine.safetensors", style=style)
    again = adapted(dit, tmp_path / "mine.safetensors")
    if style == "diffusers":
        close(run(again), run(new), 1e-6)
    else:
        assert torch.equal(run(again), run(new))
    theirs = diffusers_dit(dit)
    close(diffusers_result(theirs, dit.config), run(dit), 1e-4)
    converted = WanLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "mine.safetensors"))
    theirs.load_lora_adapter(converted, prefix="transformer")
    close(diffusers_result(theirs, dit.config), run(new), 1e-4)
    close(run(adapted(dit, converted)), run(new))


def test_we_read_what_diffusers_writes_with_its_alpha_in_the_head(dit, tmp_path):
    theirs = diffusers_dit(dit)
    config = peft.LoraConfig(r=4, lora_alpha=1, target_modules=["to_q", "to_v", "ffn.net.0.proj"])
    theirs.add_adapter(config)
    shaken(theirs)
    expected = diffusers_result(theirs, dit.config)
    theirs.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    assert not any(key.endswith("alpha") for key in state)
    close(run(adapted(dit, file)), expected, 1e-4)
    assert {row["alpha"] for row in adapted(dit, file).report().rows} == {1.0}


# Spellings.


def underscored(name):
    return official(name).replace(".", "_")


def diffusers_name(name):
    return counterparts("dit", OFFICIAL_CONFIG, [f"{name}.weight"], "diffusers")[f"{name}.weight"].names[0][
        :-7
    ]


SPELLINGS = {
    "official": dict(spell=official),
    "ComfyUI": dict(spell=lambda name: f"diffusion_model.{official(name)}"),
    "all-in-one": dict(
        spell=lambda name: f"model.diffusion_model.{official(name)}", down="lora_A", up="lora_B"
    ),
    "Diffusers": dict(spell=lambda name: f"transformer.{diffusers_name(name)}", down="lora_A", up="lora_B"),
    "PEFT": dict(spell=lambda name: f"base_model.model.{official(name)}", down="lora_A", up="lora_B"),
    "PEFT of Diffusers": dict(
        spell=lambda name: f"base_model.model.transformer.{diffusers_name(name)}",
        down="lora_A.default",
        up="lora_B.default",
    ),
    "DiffSynth": dict(
        spell=lambda name: f"pipe.dit.{official(name)}", down="lora_A.default", up="lora_B.default"
    ),
    "kohya": dict(spell=lambda name: f"lora_unet_{underscored(name)}"),
    "Wan-Fun": dict(spell=lambda name: f"lora_unet__{underscored(name)}"),
    "LyCORIS": dict(spell=lambda name: f"lycoris_{underscored(name)}"),
    "ai-toolkit": dict(spell=lambda name: f"lycoris_{diffusers_name(name).replace('.', '_')}"),
    "ours": dict(spell=lambda name: name),
    "old Diffusers": dict(
        spell=lambda name: f"transformer.{diffusers_name(name)}", down="lora.down", up="lora.up"
    ),
    "attention processors": dict(
        spell=diffusers_name, down="lora_linear_layer.down", up="lora_linear_layer.up"
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_means_the_same(image_dit, name):
    names = [
        *BLOCKS,
        *AROUND,
        "blocks.1.cross_attn.image_k",
        "blocks.0.cross_attn.image_v",
        "image_mlp.up",
        "image_mlp.down",
    ]
    state, deltas = random_lora(image_dit, names, alpha=2, **SPELLINGS[name])
    new = adapted(image_dit, state)
    close(run(new), run(with_deltas(image_dit, deltas)))
    assert {row["status"] for row in new.report().rows} == {"matched"} and len(new.report()) == len(names)


def test_an_ending_without_weight_and_one_with_an_underscore_are_read(dit):
    state, deltas = random_lora(dit, BLOCKS, alpha=2, down="lora_A", up="lora_B")
    short = {key.removesuffix(".weight"): x for key, x in state.items()}
    close(run(adapted(dit, short)), run(with_deltas(dit, deltas)))
    old = {key.replace(".lora_A", "_lora.down").replace(".lora_B", "_lora.up"): x for key, x in state.items()}
    close(run(adapted(dit, old)), run(with_deltas(dit, deltas)))


def test_differences_of_weights_biases_norms_and_modulation(image_dit):
    """As the distilled files of lightx2v have them, beside LoRAs."""
    g = torch.Generator().manual_seed(0)
    state, deltas = random_lora(
        image_dit, BLOCKS, alpha=3, spell=lambda name: f"diffusion_model.{official(name)}"
    )
    shapes = {name: x.shape for name, x in image_dit.state_dict().items()}
    for key, ours in {
        "blocks.0.diff_m": "blocks.0.modulation",
        "blocks.1.modulation.diff": "blocks.1.modulation",
        "head.diff_m": "final.modulation",
        "head.head.diff": "final.linear.weight",
        "head.head.diff_b": "final.linear.bias",
        "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "time_projection.1.diff_b": "time_projection.1.bias",
        "blocks.1.norm3.diff": "blocks.1.norm_cross.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm_cross.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "blocks.0.cross_attn.norm_k_img.diff": "blocks.0.cross_attn.image_norm_k.weight",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "img_emb.proj.0.diff": "image_mlp.norm_in.weight",
    }.items():
        state[f"diffusion_model.{key}"] = deltas[ours] = torch.randn(shapes[ours], generator=g) / 5
    for merge in (False, True):
        new = adapted(image_dit, state, merge=merge)
        close(run(new), run(with_deltas(image_dit, deltas)))
    half = adapted(image_dit, state, strength=lambda where: 0.5)
    close(run(half), run(with_deltas(image_dit, deltas, 0.5)))
    plain = adapted(image_dit, state)
    assert torch.equal(
        plain.state_dict()["blocks.0.modulation"], image_dit.state_dict()["blocks.0.modulation"]
    )


def test_the_text_encoder_takes_the_keys_that_are_its_own(dit):
    torch.manual_seed(0)
    text = TextEncoder(TextConfig(**small.TEXT)).eval().requires_grad_(False)
    ids = torch.arange(1, 8)[None]
    layer = "layers.1.attn.q"
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    state = {name: x.clone() for name, x in text.state_dict().items()}
    state[f"{layer}.weight"] += 0.5 * b @ a
    expected = weights.build("text", text.config, state)
    there = "encoder.block.1.layer.0.SelfAttention.q"
    for spelling in (
        f"text_encoders.umt5xxl.transformer.{there}",
        f"text_encoder.{there}",
        f"lora_te_{there.replace('.', '_')}",
        f"lora_te1_{there.replace('.', '_')}",
        "text_encoders.umt5xxl.blocks.1.attn.q",
    ):
        file = {
            f"{spelling}.lora_down.weight": a,
            f"{spelling}.lora_up.weight": b,
            f"{spelling}.alpha": torch.tensor(1.0),
        }
        new = adapted(text, file)
        with torch.no_grad():
            close(new(ids), expected(ids))
        mixed, deltas = random_lora(dit, BLOCKS, alpha=3)
        with pytest.warns(Note, match="1 layers of the file are not in this component"):
            both = adapted(dit, file | mixed)
        close(run(both), run(with_deltas(dit, deltas)))
        assert both.report().rows[-1]["status"] == "unmatched: for the text encoder"
        with pytest.raises(WeightsError, match=r"or for the text encoder, as in adapted\(pipe.text"):
            adapted(dit, file)


# What does not fit.


def test_what_is_missing_is_said(dit):
    state, deltas = random_lora(dit, BLOCKS)
    with pytest.warns(Note, match="20 of 20 layers have no alpha, which is then taken for the rank"):
        new = adapted(dit, state)
    assert {row["alpha"] for row in new.report().rows} == {"none"}
    assert "20 matched, 0 unmatched, 20 without alpha" in repr(new.report())
    close(run(new), run(with_deltas(dit, deltas)))
    extra = {"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(2, 36),
             "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(36, 2),
             "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.zeros(36)}  # fmt: skip
    state, deltas = random_lora(dit, BLOCKS, alpha=3)
    with pytest.warns(
        Note, match=r"1 layers of the file are not .*, such as diffusion_model.blocks.0.cross_attn.k_img"
    ):
        new = adapted(dit, state | extra)
    close(run(new), run(with_deltas(dit, deltas)))
    lost = [row["status"] for row in new.report().rows if row["status"] != "matched"]
    assert lost == ["unmatched: no such layer", "unmatched: all zeros"]


def file_of(**changes):
    """A good file of one layer, with some of its tensors changed; None: taken out."""
    state = {
        "lora_down.weight": torch.ones(2, 36),
        "lora_up.weight": torch.ones(36, 2),
        "alpha": torch.tensor(2.0),
    }
    state |= {key.replace("__", "."): x for key, x in changes.items()}
    return {f"blocks.0.self_attn.q.{part}": x for part, x in state.items() if x is not None}


BAD = {
    "empty": ({}, "the state is no adapter|none of the 0 layers"),
    "a model": ({"blocks.0.self_attn.q.weight": torch.ones(36, 36)}, "is no adapter: none of its 1 tensors"),
    "another model": (
        {"double_blocks.0.q.lora_A.weight": torch.ones(2, 3)},
        "none of the 1 layers .* is one of this dit's",
    ),
    "half": (file_of(lora_up__weight=None), "LoRA with down, which lacks up"),
    "only alpha": ({"blocks.0.self_attn.q.alpha": torch.tensor(1.0)}, "an alpha or lengths, and no change"),
    "two ranks": (file_of(lora_up__weight=torch.ones(36, 3)), r"up \[36, 3\], which do not fit each other"),
    "another size": (
        file_of(lora_down__weight=torch.ones(2, 40)),
        r"a change to a weight \[36, 40\]; .* \[36, 36\]",
    ),
    "rank 0": (
        file_of(lora_down__weight=torch.ones(0, 36), lora_up__weight=torch.ones(36, 0)),
        "LoRA of down",
    ),
    "turned": (
        {
            f"blocks.0.ffn.0.{k}": x
            for k, x in (("lora_A.weight", torch.ones(2, 50)), ("lora_B.weight", torch.ones(36, 2)))
        },
        r"a change to a weight \[36, 50\]; blocks.0.ffn.0 has a weight \[50, 36\]",
    ),
    "NaN": (file_of(lora_up__weight=torch.full((36, 2), math.nan)), "NaN or infinite"),
    "infinite alpha": (file_of(alpha=torch.tensor(math.inf)), "NaN or infinite"),
    "two alphas": (
        file_of(alpha=torch.ones(2)),
        r"alpha of blocks.0.self_attn.q is \[2\]; expected one number",
    ),
    "integers": (
        file_of(lora_up__weight=torch.ones(36, 2, dtype=torch.int8)),
        "is torch.int8; expected floating",
    ),
    "an unread key": (
        file_of(oft_blocks=torch.ones(3)),
        "1 tensors that nobody here can read, such as .*oft_blocks",
    ),
    "a new weight": ({"blocks.0.ffn.0.set_weight": torch.ones(50, 36)}, "a whole new weight"),
    "a wider layer": ({"patch_embedding.reshape_weight": torch.tensor([36, 8, 1, 2, 2])}, "widens a layer"),
    "bias of another size": ({"blocks.0.self_attn.q.diff_b": torch.ones(35)}, r"change to the bias, \[35\]"),
    "lengths of another": (file_of(dora_scale=torch.ones(35, 1)), r"DoRA lengths \[35, 1\]"),
    "twice": (
        file_of() | {f"lora_unet_{k.replace('.', '_', 3)}": x for k, x in file_of().items()},
        "under another name, too: it holds two adapters",
    ),
    "no tensors": ({"blocks.0.self_attn.q.lora_A.weight": 3}, "is int; expected floating numbers"),
    "numbers for names": ({1: torch.ones(3)}, "is no adapter"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_none_is_refused_in_words(dit, name):
    state, words = BAD[name]
    with pytest.raises(WeightsError, match=words):
        adapted(dit, state)


def test_a_call_that_makes_no_sense_is_refused(dit, tmp_path):
    with pytest.raises(ValueError, match="adapter files, or rank= for a fresh adapter: one of the two"):
        adapted(dit)
    with pytest.raises(ValueError, match="one of the two"):
        adapted(dit, file_of(), rank=3)
    for rank in (0, -1, 2.5, True, "8"):
        with pytest.raises(ValueError, match="expected a whole number from 1"):
            adapted(dit, rank=rank)
    with pytest.raises(ValueError, match="alpha=0; expected a number above 0"):
        adapted(dit, rank=2, alpha=0)
    with pytest.raises(ValueError, match=r"no layer matches '\*.self_attn.qq'"):
        adapted(dit, rank=2, targets="*.self_attn.qq")
    with pytest.raises(TypeError, match="an adapter is a path or a state; int arrived"):
        adapted(dit, 3)
    with pytest.raises(
        ContractError, match="adapted takes our DiT, Experts or TextEncoder; VAE arrived|takes"
    ):
        adapted(small.VAE(small.VAEConfig(**small.VAE_SIZES)), file_of())
    with pytest.raises(ValueError, match="there is no weights file"):
        adapted(dit, tmp_path / "gone.safetensors")


# Fresh adapters.


def test_a_fresh_adapter_changes_nothing_and_alone_asks_for_gradients(dit):
    whole = small.dit(**SIZES)  # whose parameters ask for gradients
    new = adapted(whole, rank=3)
    assert torch.equal(run(new), run(whole))
    asking = {name for name, p in new.named_parameters() if p.requires_grad}
    assert len(asking) == 2 * len(BLOCKS) and all("changes" in name for name in asking)
    assert all(p.requires_grad for p in whole.parameters())
    assert {row["layer"] for row in new.report().rows} == set(BLOCKS)


def test_training_moves_only_the_adapter(dit, tmp_path):
    before = {name: x.clone() for name, x in dit.state_dict().items()}
    new = adapted(dit, rank=3, alpha=6, targets=["*.self_attn.*", "*.ffn.0"])
    optimizer = torch.optim.AdamW([p for p in new.parameters() if p.requires_grad], lr=1e-2)
    x, text, target = torch.randn(2, 4, 2, 4, 6), [torch.randn(5, 11)] * 2, torch.randn(2, 4, 2, 4, 6)
    losses = []
    for _ in range(30):
        loss = (new(x, torch.tensor([300.0, 800.0]), text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(x, before[name]) for name, x in dit.state_dict().items())
    new.save(tmp_path / "mine.safetensors")
    assert torch.equal(run(adapted(dit, tmp_path / "mine.safetensors")), run(new))
    close(run(adapted(dit, tmp_path / "mine.safetensors", merge=True)), run(new))


@pytest.mark.parametrize("style", ["official", "diffusers", "kohya"])
def test_an_expert_and_a_text_encoder_are_written_apart(dit, tmp_path, style):
    both = adapted(Experts(dit, small.dit(seed=3, **SIZES), 0.5), rank=2)
    with pytest.raises(ValueError, match="expert=None; expected 'high' or 'low'"):
        both.save(tmp_path / "x.safetensors")
    both.save(tmp_path / "low.safetensors", style, expert="low")
    assert len(adapted(dit, tmp_path / "low.safetensors").report()) == len(BLOCKS)
    text = adapted(TextEncoder(TextConfig(**small.TEXT)).eval(), rank=2)
    text.save(tmp_path / "text.safetensors", style)
    assert len(adapted(text.wraps, tmp_path / "text.safetensors").report()) == len(text.report()) == 14


def test_what_cannot_be_written_is_refused(dit, tmp_path):
    new = adapted(dit, rank=2)
    with pytest.raises(
        ValueError, match="style='koyha'; expected official, diffusers, kohya.*did you mean 'kohya'"
    ):
        new.save(tmp_path / "x.safetensors", style="koyha")
    with pytest.raises(ValueError, match="does not end in .safetensors"):
        new.save(tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="only LoRAs can be written; others are at patch_embedding"):
        adapted(dit, {"patch_embedding.diff_b": torch.ones(36)}).save(tmp_path / "x.safetensors")
    state, _ = random_lora(dit, BLOCKS)
    with pytest.raises(WeightsError, match="only LoRAs can be written; others are at blocks.0.self_attn.q"):
        biased = state | {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(36)}
        adapted(dit, biased).save(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="several adapters, and a file holds one"):
        adapted(dit, state, random_lora(dit, BLOCKS, seed=5)[0]).save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# Fuzz.


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_means_what_it_says(dit, tmp_path_factory, data):
    """Bytes of a file changed, cut or added: an error in words, or the values that now stand in it."""
    folder = tmp_path_factory.getbasetemp()
    state, _ = random_lora(dit, BLOCKS[:4], alpha=2, spell=lambda name: f"diffusion_model.{official(name)}")
    save_file(state, folder / "good.safetensors")
    raw = bytearray((folder / "good.safetensors").read_bytes())
    head = int.from_bytes(raw[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.one_of(st.integers(0, head), st.integers(0, len(raw) - 1)))
        raw[where] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.sampled_from([len(raw)] * 4 + [len(raw) - 1, head]))]
    path = folder / "bad.safetensors"
    path.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            new = adapted(dit, path)
        except ValueError as error:
            assert len(str(error)) > 20
            return
    read = load_file(path)  # the library's own reading of the same bytes
    for one in new.applied:
        key = next(row["key"] for row in new.report().rows if row["layer"] == one.where.path)
        parts = {name.removeprefix(key + "."): x for name, x in read.items() if name.startswith(key + ".")}
        down, up = (next(x for part, x in parts.items() if kind in part) for kind in ("_down", "_up"))
        scale = float(parts["alpha"]) / len(down) if "alpha" in parts else 1.0
        torch.testing.assert_close(one.change.delta(), scale * up.float() @ down.float())


def test_a_head_that_says_nonsense_of_alpha_is_refused_or_passed_by(dit, tmp_path):
    state, _ = random_lora(dit, BLOCKS[:2], spell=lambda name: f"transformer.{diffusers_name(name)}")
    for said, fine in (("{", True), ("[1]", True), (json.dumps({"transformer.lora_alpha": "much"}), False)):
        save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": said})
        if fine:
            adapted(dit, tmp_path / "x.safetensors")
        else:
            with pytest.raises(WeightsError, match="lora_alpha is much; expected a number"):
                adapted(dit, tmp_path / "x.safetensors")


def test_an_adapter_says_the_run_it_was_distilled_for(dit, tmp_path):
    sampling = {"steps": [1.0, 0.757, 0.522], "solver": "euler", "scale": 1.0}
    fresh = adapted(dit, rank=2)
    assert fresh.sampling is None
    fresh.save(tmp_path / "fast.safetensors", sampling=sampling)
    fresh.save(tmp_path / "plain.safetensors")
    fast = adapted(dit, tmp_path / "fast.safetensors")
    assert fast.sampling == sampling | {"steps": (1.0, 0.757, 0.522)}
    assert adapted(dit, tmp_path / "plain.safetensors").sampling is None
    # Another adapter around it changes nothing about that.
    assert adapted(fast, tmp_path / "plain.safetensors").sampling == fast.sampling


@pytest.mark.parametrize(
    "sampling, message",
    [
        ({"stepz": 4}, "sampling has stepz=4; expected steps, a number or a list"),
        ({"steps": "four"}, "sampling has steps='?four"),
        ({"steps": [0.5, 0.9]}, "expected noise levels that fall"),
    ],
)
def test_a_head_that_says_nonsense_of_sampling_is_refused(dit, tmp_path, sampling, message):
    fresh = adapted(dit, rank=2)
    with pytest.raises(WeightsError, match=message):
        fresh.save(tmp_path / "a.safetensors", sampling=sampling)
    fresh.save(tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    save_file(state, tmp_path / "a.safetensors", {"moddiff.sampling": json.dumps(sampling)})
    with pytest.raises(WeightsError, match=message):
        adapted(dit, tmp_path / "a.safetensors")
