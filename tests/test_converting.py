"""Are converted weights the same weights, under the names and of the type that were asked for?"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contents import command
from test_gguf import DIT, state_of, write
from test_packing import FP8
from test_single import VAE
from test_single import state_of as other_state

from moddiff.weights import WeightsError, build, contents, convert, load_component, rename

WIDE = DIT | dict(text_len=512)


@pytest.mark.parametrize("to", ["official", "diffusers", "ours"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_blocks_are_expanded_and_renamed(tmp_path, to, dtype):
    path = write(tmp_path / "x.gguf", state_of("dit", DIT), kind="q4_1")
    with pytest.raises(ValueError, match="GGUF blocks.*dtype='bf16'"):
        convert(path, tmp_path / "y.safetensors", to)
    kind, count, size = convert(path, tmp_path / "y.safetensors", to, dtype)
    written = load_file(tmp_path / "y.safetensors")
    assert (kind, count, size) == ("dit", len(written), sum(x.nbytes for x in written.values()))
    module = load_component(path, "dit", WIDE, dtype)
    wanted = rename(module.state_dict(), "dit", to, WIDE)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)


def test_8_bit_weights_stay_so_where_no_type_is_asked_for(tmp_path):
    config = WIDE | dict(dim=128, num_heads=1)
    state = rename(build("dit", config).state_dict(), "dit", "official", config)
    name = "blocks.1.ffn.2.weight"
    scale = state[name].abs().amax(1, keepdim=True) / 448
    packed = {name: (state[name] / scale).to(FP8), "blocks.1.ffn.2.scale_weight": scale}
    save_file(state | packed, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers")
    written = load_file(tmp_path / "y.safetensors")
    assert written["blocks.1.ffn.net.2.weight"].dtype == FP8
    assert {"blocks.1.ffn.net.2.weight_scale", "blocks.1.ffn.net.2.comfy_quant"} <= written.keys()
    a, b = (load_component(tmp_path / f"{x}.safetensors", "dit", config) for x in "xy")
    weights = [module.blocks[1].ffn[2].weight for module in (a, b)]
    assert torch.equal(weights[0].expand(), weights[1].expand())


def test_pickles_and_autoencoders_too(tmp_path):
    torch.save(other_state("vae", VAE), tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", tmp_path / "y.safetensors", "diffusers", "fp16")[0] == "vae"
    written = load_file(tmp_path / "y.safetensors")
    assert all(x.dtype == torch.float16 for x in written.values()) and "quant_conv.weight" in written
    back = build("vae", VAE, written, "fp32").state_dict()
    wanted = build("vae", VAE, other_state("vae", VAE)).state_dict()
    assert all(torch.equal(back[name], wanted[name].half().float()) for name in wanted)


def test_a_width_that_tells_no_heads_needs_a_config_everywhere(tmp_path, capsys):
    config = WIDE | dict(dim=96, num_heads=3)
    model = build("dit", config)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    (tmp_path / "c.json").write_text(json.dumps(config))
    for act in (contents, lambda path: convert(path, tmp_path / "y.safetensors")):
        with pytest.raises(WeightsError, match="96 wide, and how many heads it has is in no shape.*--config"):
            act(tmp_path / "x.safetensors")
    for given in (config, tmp_path / "c.json"):
        assert convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", config=given)[0] == "dit"
        assert "3 heads" in contents(tmp_path / "x.safetensors", config=given).config
    back = load_component(tmp_path / "y.safetensors", "dit", config).state_dict()
    assert all(torch.equal(back[name], x) for name, x in model.state_dict().items())
    command("inspect", tmp_path / "x.safetensors", "--config", tmp_path / "c.json")
    command(
        "convert", tmp_path / "x.safetensors", tmp_path / "z.safetensors", "--config", tmp_path / "c.json"
    )
    assert "3 heads" in capsys.readouterr().out and (tmp_path / "z.safetensors").is_file()
