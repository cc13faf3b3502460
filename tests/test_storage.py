"""Does a weight that is kept small stand for the right numbers, through all that happens to a model?"""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_decoders import random_blocks, reference

from moddiff.dit import DiT, DiTConfig
from moddiff.hooks import capture, patch
from moddiff.linear import Embedding, Linear, Linear32, dense, store
from moddiff.storage import Blocks, Scaled, Stored
from moddiff.storage import stored as stored_module
from moddiff.storage.decoders import TYPES

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def blocks(kind="q4_k", out=6, per_row=2, dtype=torch.float32):
    codes = torch.from_numpy(random_blocks(kind, out * per_row)).reshape(out, -1)
    return Blocks(codes, kind, dtype)


def scaled(codes=torch.float8_e4m3fn, out=6, width=512, scale="row", dtype=torch.float32):
    torch.manual_seed(0)
    if codes == torch.int8:
        numbers = torch.randint(-127, 128, (out, width), dtype=torch.int8)
    else:
        numbers = torch.randn(out, width).to(codes)
    shape = {"all": (), "row": (out, 1), "tile": (out // 2, width // 32), "musubi": (out, width // 32, 1)}
    return Scaled(numbers, torch.rand(shape[scale]) + 0.5, dtype)


STORAGES = {
    **{kind: (lambda kind=kind: blocks(kind)) for kind in TYPES},
    "fp8": lambda: scaled(),
    "fp8 tile": lambda: scaled(scale="tile"),
    "e5m2": lambda: scaled(torch.float8_e5m2, scale="all"),
    "int8": lambda: scaled(torch.int8),
}


@pytest.mark.parametrize("name", STORAGES)
def test_a_layer_computes_with_the_numbers_that_its_weight_stands_for(name):
    weight = STORAGES[name]()
    layer = store(Linear(weight.shape[1], 6), weight)
    numbers = weight.expand()
    assert tuple(numbers.shape) == tuple(weight.shape) and numbers.dtype == weight.dtype == torch.float32
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(layer(x), F.linear(x, numbers, layer.bias), rtol=1e-4, atol=1e-3)
    assert torch.equal(dense(layer), numbers)
    assert torch.equal(dense(layer, torch.bfloat16), numbers.bfloat16())


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_blocks_are_the_rows_of_the_matrix(kind):
    weight = blocks(kind, out=5, per_row=3)
    theirs = reference(kind, weight.codes.reshape(-1, TYPES[kind].bytes).numpy())
    assert torch.equal(weight.expand(), torch.from_numpy(theirs).reshape(weight.shape))


@pytest.mark.parametrize("codes", [*FP8, torch.int8])
@pytest.mark.parametrize("scale", ["all", "row", "tile", "musubi"])
def test_a_scale_multiplies_what_it_belongs_to(codes, scale):
    weight = scaled(codes, scale=scale)
    given, numbers = weight.scale, weight.codes.float()
    down, across = given.shape
    for i in range(6):
        for j in range(0, 512, 32):
            factor = given[i * down // 6, j * across // 512]
            assert torch.equal(weight.expand()[i, j : j + 32], numbers[i, j : j + 32] * factor)


@pytest.mark.parametrize("shape", [(5,), (4, 1), (6, 7), (6, 2, 2), (0,)], ids=str)
def test_a_scale_that_fits_nothing_is_refused(shape):
    with pytest.raises(ValueError, match=r"does not fit a weight of \[6, 512\]"):
        Scaled(torch.zeros(6, 512, dtype=torch.int8), torch.ones(shape))


def test_what_is_no_storage_is_refused():
    with pytest.raises(TypeError, match="codes are torch.float16"):
        Scaled(torch.zeros(2, 2).half())
    with pytest.raises(ValueError, match="no blocks of kind 'q7'"):
        Blocks(torch.zeros(1, 18, dtype=torch.uint8), "q7")
    with pytest.raises(ValueError, match="whole blocks of q4_0"):
        Blocks(torch.zeros(1, 19, dtype=torch.uint8), "q4_0")
    with pytest.raises(TypeError, match="stands for torch.int8"):
        Blocks(torch.zeros(1, 18, dtype=torch.uint8), "q4_0", torch.int8)
    with pytest.raises(ValueError, match=r"\[6, 512\]; expected \[6, 500\]"):
        store(Linear(500, 6), blocks())


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("convert", ["to", "half", "bfloat16", "type", "double"])
def test_converting_a_model_changes_what_the_weight_stands_for_and_no_byte_of_it(name, convert):
    weight = STORAGES[name]()
    kept = {key: x.clone() for key, x in weight.state_dict().items()}
    layer = store(Linear(weight.shape[1], 6), weight)
    wanted = {"half": torch.float16, "double": torch.float64}.get(convert, torch.bfloat16)
    layer = getattr(layer, convert)(*([wanted] if convert in ("to", "type") else []))
    assert layer.weight.dtype == wanted and layer(torch.randn(2, weight.shape[1])).dtype == wanted
    for key, x in layer.weight.state_dict().items():
        assert x.dtype == kept[key].dtype
        assert torch.equal(x.contiguous().view(torch.uint8), kept[key].contiguous().view(torch.uint8))
    assert torch.equal(layer.float().weight.expand(), STORAGES[name]().expand())


@pytest.mark.parametrize("name", ["q4_k", "fp8 tile", "int8"])
def test_copies_files_and_devices_keep_it(name, tmp_path):
    torch.manual_seed(0)
    layer = store(Linear(512, 6), STORAGES[name]())
    x = torch.randn(3, 512)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.buffers(), layer.buffers()))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    for tensor in twin.state_dict().values():
        tensor.view(torch.uint8).zero_() if tensor.ndim else tensor.zero_()
    twin.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(twin(x), layer(x))
    hollow = copy.deepcopy(layer).to("meta")
    assert hollow(x.to("meta")).shape == (3, 6) and hollow.weight.is_meta
    hollow.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert torch.equal(hollow(x), layer(x))


def test_derivatives_flow_through_to_what_comes_before():
    layer = store(Linear(512, 6), blocks()).requires_grad_(False)
    x = torch.randn(3, 512, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense(layer).sum(0).expand(3, 512), rtol=1e-4, atol=1e-3)


def test_a_layer_in_float32_stays_so():
    layer = store(Linear32(512, 6), blocks(dtype=torch.bfloat16))
    assert layer(torch.randn(2, 512).bfloat16()).dtype == torch.float32


def test_a_large_matrix_is_expanded_in_pieces(monkeypatch):
    weight = blocks("q6_k", out=7)
    whole = weight.expand()
    monkeypatch.setattr(stored_module, "AT_ONCE", 1500)
    assert torch.equal(weight.expand(), whole)
    assert torch.equal(scaled(scale="tile").expand(), scaled(scale="tile").expand().clone())


@pytest.mark.parametrize("name", ["q8_0", "fp8 tile", "int8"])
def test_a_table_expands_only_the_rows_that_are_asked_for(name, monkeypatch):
    weight = STORAGES[name]()
    table = store(Embedding(6, weight.shape[1]), weight)
    whole, asked = weight.expand(), []
    decode = type(weight).decode
    monkeypatch.setattr(
        type(weight), "decode", lambda self, rows: asked.append(len(rows)) or decode(self, rows)
    )
    ids = torch.tensor([[5, 0], [3, 3]])
    assert torch.equal(table(ids), whole[ids]) and asked == [4]


def test_numbers_that_are_none_are_counted():
    assert [STORAGES[name]().flaws() for name in STORAGES] == [0] * len(STORAGES)
    weight = scaled()
    weight.codes.view(torch.uint8)[2, 3] = 0x7F
    assert weight.flaws() == 1 == int((~weight.expand().isfinite()).sum())
    weight.scale[4] = float("inf")
    assert weight.flaws() >= 500
    weight = scaled(torch.float8_e5m2)
    weight.codes.view(torch.uint8)[2, 3] = 0xFC
    assert weight.flaws() == 1 == int((~weight.expand().isfinite()).sum())


@pytest.mark.parametrize("kind", [kind for kind in TYPES if TYPES[kind].halves])
def test_a_scale_that_is_no_number_counts_for_its_whole_block(kind):
    weight = blocks(kind)
    for bits in (0x7C00, 0x7E01, 0xFC00):  # infinity, NaN, minus infinity
        at = TYPES[kind].halves[-1]
        weight.codes[0, at], weight.codes[0, at + 1] = bits & 255, bits >> 8
        assert weight.flaws() == TYPES[kind].values
        assert not weight.expand()[0, : TYPES[kind].values].isfinite().any()


def test_it_says_what_it_is():
    assert "q4_k, [6, 512], 4.5 bits a number, for torch.float32" in repr(blocks())
    assert "int8" in repr(scaled(torch.int8)) and "Linear" in repr(store(Linear(512, 6), blocks()))
    assert isinstance(blocks(), Stored) and blocks().nbytes == 6 * 2 * 144 and blocks().numel() == 6 * 512


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.int8])
def test_a_whole_model_is_tapped_patched_copied_and_saved_as_ever(codes):
    torch.manual_seed(0)
    config = DiTConfig("t2v", 4, 32, 48, 16, 24, 4, 2, 2, text_len=16)
    dit = DiT(config).eval().requires_grad_(False)
    plain = copy.deepcopy(dit)
    for layer, twin in zip(list(dit.blocks.modules()), list(plain.blocks.modules())):
        if isinstance(layer, Linear):
            amax = layer.weight.abs().amax(1, keepdim=True)
            most = 127 if codes == torch.int8 else 448
            codes_of = (layer.weight / amax * most).round() if most == 127 else layer.weight / amax * most
            store(layer, Scaled(codes_of.to(codes), amax / most, torch.float32))
            twin.weight.copy_(dense(layer))
    inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), [torch.randn(5, 24)]
    with capture(dit, "blocks.1.cross_attn.probs") as kept:
        out = dit(*inputs)
    with capture(plain, "blocks.1.cross_attn.probs") as wanted:
        assert torch.equal(plain(*inputs), out)
    tap = "blocks.1.cross_attn.probs"
    assert torch.equal(kept[tap], wanted[tap])
    with patch(dit, tap, lambda x, where: x * 0):
        assert not torch.equal(dit(*inputs), out)
    twin = copy.deepcopy(dit)
    assert torch.equal(twin(*inputs), out)
    fresh = copy.deepcopy(dit).to("meta")
    fresh.load_state_dict(dit.state_dict(), assign=True)
    assert torch.equal(fresh(*inputs), out)
