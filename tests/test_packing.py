"""Does every spelling of an 8 bit file give the same numbers, and is no scale ever lost?"""

import json

import comfy_kitchen
import pytest
import torch
from safetensors.torch import save_file

from moddiff.storage import Blocks, Scaled
from moddiff.weights import CheckpointError, WeightsError, build, load_component, rename
from moddiff.weights.files import read

DIT = dict(
    model_type="t2v",
    in_dim=4,
    dim=32,
    ffn_dim=64,
    freq_dim=16,
    text_dim=24,
    out_dim=4,
    num_heads=2,
    num_layers=2,
    text_len=16,
)
FP8 = torch.float8_e4m3fn
SPELLINGS = ("old", "new", "head", "head without prefix", "inverse", "musubi")


def plain():
    torch.manual_seed(0)
    return {
        name: x.bfloat16()
        for name, x in rename(build("dit", DIT).state_dict(), "dit", "official", DIT).items()
    }


def note(kind="float8_e4m3fn", **more):
    text = json.dumps({"format": kind} | more).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def quantized(spelling, prefix="", codes=FP8):
    """(state in that spelling, metadata of its head, {official name: the numbers it stands for})"""
    state, numbers, layers = {}, {}, {}
    most = 127 if codes == torch.int8 else torch.finfo(codes).max
    for name, x in plain().items():
        linear = x.ndim == 2 and name.startswith("blocks") and name.endswith("weight")
        if not linear:
            state[prefix + name], numbers[name] = x, x
            continue
        stem, x = prefix + name.removesuffix(".weight"), x.float()
        groups = x.unflatten(1, (4, -1)) if spelling == "musubi" else x.reshape(1, 1, -1)
        scale = groups.abs().amax(-1, keepdim=True) / most  # [out, 4, 1] or [1, 1, 1]
        q = groups / scale
        q = (q.round() if codes == torch.int8 else q).to(codes)
        state[f"{stem}.weight"] = q.reshape(x.shape)
        numbers[name] = (q.float() * scale).reshape(x.shape).bfloat16()
        scale = scale if spelling == "musubi" else scale.reshape(())
        leaf = {"old": "scale_weight", "musubi": "scale_weight", "inverse": "weight_scale_inv"}
        state[f"{stem}.{leaf.get(spelling, 'weight_scale')}"] = scale
        kind = {torch.int8: "int8_tensorwise"}.get(codes, str(codes).removeprefix("torch."))
        if spelling == "new":
            state[f"{stem}.comfy_quant"] = note(kind)
            state[f"{stem}.input_scale"] = torch.tensor(0.5)
        if spelling == "old":
            state[f"{stem}.scale_input"] = torch.tensor(1.0)
        layers[stem if spelling == "head" else stem.removeprefix(prefix)] = {"format": kind}
    if spelling in ("old", "musubi"):
        state[prefix + "scaled_fp8"] = torch.zeros(2, dtype=FP8)
    told = json.dumps({"format_version": "1.0", "layers": layers})
    return state, {"_quantization_metadata": told} if spelling.startswith("head") else None, numbers


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("codes", [FP8, torch.float8_e5m2, torch.int8])
def test_a_file_in_any_spelling_is_kept_as_it_is_and_stands_for_the_right_numbers(
    tmp_path, spelling, prefix, codes
):
    state, told, numbers = quantized(spelling, prefix, codes)
    save_file(state, tmp_path / "x.safetensors", metadata=told)
    kept = load_component(tmp_path / "x.safetensors", "dit", DIT, dtype="as stored")
    dense = load_component(tmp_path / "x.safetensors", "dit", DIT, dtype="bf16")
    wanted = build("dit", DIT, numbers)
    assert kept.blocks[0].ffn[0].weight.codes.dtype == codes
    inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), [torch.randn(5, 24)]
    with torch.no_grad():
        assert torch.equal(dense(*inputs), wanted(*inputs))
        assert torch.equal(kept(*inputs), wanted(*inputs))


@pytest.mark.parametrize("codes", [FP8, torch.float8_e5m2])
def test_an_8_bit_file_without_scales_means_what_it_says(tmp_path, codes):
    state = {name: x.to(codes) for name, x in plain().items()}
    save_file(state, tmp_path / "x.safetensors")
    kept = load_component(tmp_path / "x.safetensors", "dit", DIT)
    layer = kept.blocks[1].cross_attn.q
    assert layer.weight.codes.dtype == codes
    assert isinstance(layer.weight, Scaled) and isinstance(kept.patch_embedding.weight, torch.nn.Parameter)
    assert torch.equal(layer.weight.expand(), state["blocks.1.cross_attn.q.weight"].bfloat16())
    assert torch.equal(kept.blocks[0].modulation, state["blocks.0.modulation"].bfloat16())


def test_what_was_saved_of_such_a_model_is_read_again():
    state, _, _ = quantized("musubi")
    kept = build("dit", DIT, state)
    again = build("dit", DIT, kept.state_dict())
    assert torch.equal(again.blocks[0].ffn[2].weight.expand(), kept.blocks[0].ffn[2].weight.expand())
    blocks = Blocks(torch.zeros(64, 34, dtype=torch.uint8), "q8_0")
    ours = build("dit", DIT).state_dict()
    ours["blocks.0.ffn.0.weight.q8_0"] = blocks.codes
    del ours["blocks.0.ffn.0.weight"]
    assert isinstance(build("dit", DIT, ours).blocks[0].ffn[0].weight, Blocks)


def without(state, ending):
    name = next(name for name in state if name.endswith(ending))
    return {other: x for other, x in state.items() if other != name}


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_a_scale_that_is_lost_is_an_error(spelling):
    state, _, _ = quantized(spelling)
    lame = without(state, "weight_scale" if spelling == "new" else "scale_weight")
    with pytest.raises(WeightsError, match="its scale is not here"):
        build("dit", DIT, lame)
    state["blocks.9.ffn.0.scale_weight"] = torch.ones(())
    with pytest.raises(WeightsError, match="1 surplus, no place for: blocks.9.ffn.0.scale_weight"):
        build("dit", DIT, state)
    del state["blocks.9.ffn.0.scale_weight"]
    state["text_embedding.0.scale_weight"] = torch.ones(())  # beside a weight of 16 bits
    with pytest.raises(WeightsError, match="(?s)surplus.*belong to no 8 bit weight"):
        build("dit", DIT, state)


def test_two_scales_and_scales_that_fit_nothing_are_errors():
    state, _, _ = quantized("old")
    stem = "blocks.0.ffn.0"
    with pytest.raises(WeightsError, match="has several scales"):
        build("dit", DIT, state | {f"{stem}.weight_scale": torch.ones(())})
    with pytest.raises(WeightsError, match=r"blocks.0.ffn.0.weight: a scale of \[5\]"):
        build("dit", DIT, state | {f"{stem}.scale_weight": torch.ones(5)})
    with pytest.raises(WeightsError, match="1 broken, NaN"):
        build("dit", DIT, state | {f"{stem}.scale_weight": torch.tensor(float("nan"))})


@pytest.mark.parametrize(
    "told, words",
    [
        (note("nvfp4"), "quantized as nvfp4, which is not read here"),
        (note("int8_tensorwise", convrot=True), "int8_tensorwise with rotated columns"),
        (note("float8_e5m2"), "should be float8_e5m2 by its note, but its weight is torch.float8_e4m3fn"),
        (torch.tensor([1, 2, 3], dtype=torch.uint8), "is not JSON"),
        (torch.tensor([1.5, 2.5]), "is not JSON"),
        (torch.tensor(list(b"[1]"), dtype=torch.uint8), "quantized as None"),
    ],
    ids=["nvfp4", "rotated", "other", "noise", "floats", "list"],
)
def test_formats_that_are_not_read_here_are_refused_by_name(told, words):
    state, _, _ = quantized("new")
    with pytest.raises(WeightsError, match=words):
        build("dit", DIT, state | {"blocks.0.ffn.0.comfy_quant": told})


def test_a_head_that_speaks_of_other_layers_is_an_error(tmp_path):
    state, _, _ = quantized("new")
    for told, words in (
        ('{"layers": {"blocks.7.ffn.0": {"format": "nvfp4"}}}', "blocks.7.ffn.0 is quantized, but holds 0"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
    ):
        save_file(state, tmp_path / "x.safetensors", metadata={"_quantization_metadata": told})
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "x.safetensors")


def test_16_bit_numbers_in_float16_make_the_others_stand_for_it():
    state, _, _ = quantized("old")
    half = {name: x.half() if x.dtype == torch.bfloat16 else x for name, x in state.items()}
    assert build("dit", DIT, half).blocks[0].ffn[0].weight.dtype == torch.float16
    assert build("dit", DIT, state).blocks[0].ffn[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("codes", [FP8, torch.float8_e5m2, torch.int8])
def test_numbers_are_those_that_comfyui_s_own_kernels_give(codes):
    torch.manual_seed(0)
    x = torch.randn(24, 64)
    if codes == torch.int8:
        q, scale = comfy_kitchen.quantize_int8_rowwise(x)
        wanted = comfy_kitchen.dequantize_int8_simple(q, scale)
    else:
        scale = x.abs().max() / torch.finfo(codes).max
        q = comfy_kitchen.quantize_per_tensor_fp8(x, scale, codes)
        wanted = comfy_kitchen.dequantize_per_tensor_fp8(q, scale, torch.float32)
    assert torch.equal(Scaled(q, scale, torch.float32).expand(), wanted.float())
