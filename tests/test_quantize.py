"""Are weights in fewer bits what the formats say, and is what they cost what is reported?"""

import re

import gguf
import numpy as np
import pytest
import small
import torch
from torch import nn

from moddiff.experts import Experts
from moddiff.extensions import layers, quantized
from moddiff.hooks import capture, patch, zero
from moddiff.linear import Linear, Linear32, dense, store
from moddiff.storage import ENCODERS, Blocks, Dynamic, Scaled

PROMPT = "a red circle moving left on a black background"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def weights(*shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made) * torch.rand(shape[0], 1, generator=made).exp()


# ---- the formats, against independent ones ----


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (33, 160)])
def test_blocks_are_those_of_gguf_to_the_byte(kind, shape):
    x = weights(*shape, seed=shape[0])
    x[0, :32] = 0
    x[-1, 0] = -x.abs().max()
    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(ENCODERS[kind](x).codes.numpy(), theirs)


@pytest.mark.parametrize(
    "kind, largest, code", [("int8", 127, torch.int8), ("fp8", 448, torch.float8_e4m3fn)]
)
def test_a_row_is_scaled_by_its_largest(kind, largest, code):
    x = weights(9, 40)
    x[3] = 0
    stored = ENCODERS[kind](x)
    assert stored.codes.dtype == code and stored.shape == x.shape
    scale = (x.abs().amax(1) / largest).double()
    for row in range(9):
        wanted = x[row].double() / (scale[row] if row != 3 else 1)
        wanted = wanted.round() if code == torch.int8 else wanted.float().to(code).double()
        got = stored.expand()[row].double()
        torch.testing.assert_close(got, wanted * scale[row], atol=1e-6, rtol=1e-5)


def test_int8_is_that_of_torchao():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    x = weights(24, 64)
    theirs = nn.Linear(64, 24, bias=False)
    theirs.weight.data.copy_(x)
    quantize_(theirs, Int8WeightOnlyConfig())
    ours = ENCODERS["int8"](x).expand()
    step = x.abs().amax(1, keepdim=True) / 127
    # They divide by 127.5 and may use -128; both are within half a step of the weight, or nearly.
    assert ((theirs.weight.dequantize() - ours).abs() <= step).all()
    assert ((ours - x).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_errors_are_as_many_bits_promise(kind):
    """Of a Gaussian, relative root mean square: what the formats' makers and others measured."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    error = float((ENCODERS[kind](x).expand() - x).square().mean().sqrt())
    low, high = {"q8_0": (0.005, 0.0056), "q4_0": (0.083, 0.089)}.get(
        kind.removesuffix("-dynamic"), (0, 0.03)
    )
    assert low < error < high


# ---- products of rounded inputs ----


@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 1, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_dynamic_is_the_product_of_rounded_numbers(shape, bias):
    layer = Linear(48, 17, bias=bias)
    x = torch.randn(*shape, 48)
    store(layer, ENCODERS["int8-dynamic"](weights(17, 48)))
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True) / 127
        wanted = (x / scale).round().double() @ layer.weight.codes.double().T
        wanted = wanted * scale * layer.weight.scale.double().T
        wanted = wanted + (layer.bias.double() if bias else 0)
        torch.testing.assert_close(layer(x).double(), wanted, atol=1e-5, rtol=1e-5)
        assert layer(x.bfloat16()).dtype == torch.float32  # what the weight stands for


@torch.no_grad()
def test_fp8_dynamic_rounds_the_inputs():
    layer, x = Linear(48, 17), torch.randn(6, 48)
    store(layer, ENCODERS["fp8-dynamic"](weights(17, 48)))
    scale = x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(layer(x), rounded @ dense(layer).T + layer.bias, atol=1e-5, rtol=1e-5)


def test_a_derivative_goes_through_the_numbers():
    layer, x = Linear(32, 8), torch.randn(4, 32, requires_grad=True)
    store(layer, ENCODERS["int8-dynamic"](weights(8, 32)))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense(layer).sum(0).expand(4, -1))


# ---- the extension ----


@pytest.mark.parametrize("kind", ENCODERS)
def test_layers_of_blocks_are_quantized_and_no_others(pipe, kind):
    new = quantized(pipe.dit, kind)
    wanted = {"q8_0": Blocks, "q4_0": Blocks}.get(kind, Dynamic if "dynamic" in kind else Scaled)
    for path, layer in layers(new).items():
        inside = path.startswith("blocks.") and not (kind[0] == "q" and layer.in_features % 32)
        assert (type(layer.weight) is wanted) == inside, path
        assert isinstance(layer.weight, nn.Parameter) != inside
    for row in new.report().rows:
        was, now = layers(pipe.dit)[row["layer"]], layers(new)[row["layer"]]
        if "error" in row:
            error = (dense(now) - dense(was)).norm() / dense(was).norm()
            assert row["error"] == pytest.approx(float(error), rel=1e-4)
            assert row["MB"] == now.weight.nbytes / 1e6 < row["MB_before"] == was.weight.nbytes / 1e6
        else:
            assert torch.equal(was.weight, now.weight) and row["stays"]


def test_skipped_layers_stay_and_say_so(pipe):
    new = quantized(pipe.dit, "int8", skip=[r"blocks\.0\.", r"ffn\.2$"])
    stays = {row["layer"] for row in new.report().rows if row.get("stays") == "skipped"}
    assert {"blocks.0.self_attn.q", "blocks.1.ffn.2"} <= stays and "blocks.1.ffn.0" not in stays
    assert all(isinstance(layers(new)[path].weight, nn.Parameter) for path in stays)


def test_text_and_image_encoders_and_experts(pipe, tmp_path):
    text = quantized(pipe.text, "int8", skip=r"\.down$")
    whole, few = pipe.text.encode([PROMPT])[0], text.encode([PROMPT])[0]
    assert 0 < (few - whole).abs().max() < 0.2 * whole.abs().max()
    image = small.pipeline(tmp_path, task="i2v").image
    assert len([row for row in quantized(image, "int8").report().rows if "error" in row]) == 8
    both = quantized(Experts(pipe.dit, small.dit(seed=4), 0.9), "fp8")
    assert {row["layer"].split(".")[0] for row in both.report().rows if "error" in row} == {"high", "low"}


def test_taps_and_edits_work_on_quantized_layers(pipe):
    new = pipe.replace(dit=quantized(pipe.dit, "int8-dynamic"))
    with capture(new.dit, "blocks.1.self_attn.q") as seen, patch(new.dit, "blocks.0.ffn", zero()):
        new(PROMPT, seed=0, steps=2)
    assert len(seen)


def test_torchaos_configs_are_handed_on(pipe):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        new = quantized(pipe.dit, config)
        errors = [row["error"] for row in new.report().rows if "error" in row]
        assert len(errors) == 2 * 10 and all(0 < error < 0.02 for error in errors)
        assert isinstance(layers(pipe.dit)["blocks.0.ffn.0"].weight, nn.Parameter)
        assert len(pipe.replace(dit=new)(PROMPT, seed=0, steps=1).frames) == small.FRAMES
    assert isinstance(layers(new)["final.linear"], Linear32)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("int3", {}, "kind='int3'); expected one of int8, int8-dynamic, fp8, fp8-dynamic, q8_0, q4_0"),
        ("int8", dict(skip="blok"), "skip='blok') meets no layer; the layers are "),
    ],
)
def test_a_slip_is_told(pipe, kind, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quantized(pipe.dit, kind, **options)


def test_a_component_with_nothing_to_quantize_is_refused(pipe):
    with pytest.raises(ValueError, match="no layer of VAE to quantize, it has no linear layers"):
        quantized(pipe.vae, "int8")
    with pytest.raises(ValueError, match="all stay .*quantized already"):
        quantized(quantized(pipe.dit, "int8"), "fp8")
