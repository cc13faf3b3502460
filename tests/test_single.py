"""Do single files become a pipeline, whatever they are and however they are named?"""

import json

import gguf
import pytest
import torch
from safetensors.torch import save_file
from test_gguf import llama as llama_name
from test_gguf import write
from test_pieces import comfy, llama, model  # noqa: F401  a fixture

from moddiff import configs, load
from moddiff.experts import Experts
from moddiff.storage import Blocks, Scaled
from moddiff.weights import CheckpointError, WeightsError, build, load_component, preset, rename
from moddiff.weights.files import read
from moddiff.weights.pieces import tokenizer_of
from moddiff.weights.single import goes_with, part_of

DIT = dict(
    model_type="t2v",
    in_dim=16,
    dim=128,
    ffn_dim=256,
    freq_dim=64,
    text_dim=64,
    out_dim=16,
    num_heads=1,
    num_layers=2,
)
TEXT = dict(vocab=512, dim=64, dim_attn=64, dim_ffn=96, num_heads=4, num_layers=2)
VAE = dict(dim=8, z_dim=16, num_res_blocks=1)
FP8 = torch.float8_e4m3fn


def state_of(kind, config, naming="official", seed=0):
    torch.manual_seed(seed)
    return rename(build(kind, config).state_dict(), kind, naming, config)


def scaled(state, codes=FP8):
    """As ComfyUI's fp8_scaled files: linear weights of the blocks in 8 bits, a scale beside each."""
    new = {"scaled_fp8": torch.zeros(2, dtype=codes)}
    for name, x in state.items():
        if "block" in name and x.ndim == 2 and "bias" not in name and "norm" not in name:
            scale = x.abs().max() / torch.finfo(codes).max
            new |= {name: (x / scale).to(codes), name.replace(".weight", ".scale_weight"): scale}
        else:
            new[name] = x.half()
    return new


@pytest.fixture
def parts(tmp_path, model):  # noqa: F811
    """{part: file} of a small model, every file of another kind and under a name that says nothing."""
    dit = scaled({"model.diffusion_model." + name: x for name, x in state_of("dit", DIT).items()})
    save_file(dit, tmp_path / "a.pth")  # content decides
    text = scaled(state_of("text", TEXT, "diffusers"), torch.float8_e5m2)  # the coarser kind
    text |= {"spiece_model": read(comfy(tmp_path, model))["spiece_model"]}
    del text["encoder.embed_tokens.weight"]
    save_file(text, tmp_path / "b.bin")
    torch.save(state_of("vae", VAE), tmp_path / "c.safetensors.pth")
    return {"dit": tmp_path / "a.pth", "text": str(tmp_path / "b.bin"), "vae": tmp_path / "c.safetensors.pth"}


def run(pipe):
    return pipe("a red circle", steps=2, frames=5, size=(32, 32), seed=0).frames


def test_three_files_and_a_name_are_a_pipeline(parts):
    kept = load("wan2.1-t2v-1.3b", **parts, dtype="as stored")
    assert isinstance(kept.dit.blocks[0].ffn[0].weight, Scaled)
    assert kept.text.layers[0].attn.q.weight.kind == "fp8 e5m2"
    assert kept.dit.config == configs.read("dit", DIT) and kept.defaults["steps"] == 50
    assert run(kept).shape == (5, 32, 32, 3)
    wide = load("wan2.1-t2v-1.3b", **parts, dtype="fp32")
    assert not any(isinstance(module, Scaled) for module in wide.dit.modules())
    kept.dit.float(), kept.text.float()
    assert (run(kept) == run(wide)).all()
    assert (run(load("wan2.1-t2v-1.3b", **parts)) == run(load("wan2.1-t2v-1.3b", **parts))).all()


def test_one_file_that_holds_all_three_is_each_of_them(parts, tmp_path):
    """As ComfyUI saves a whole checkpoint: a prefix for each component."""
    text = {f"text_encoders.umt5xxl.{'' if 'spiece' in name else 'transformer.'}{name}": x
            for name, x in read(parts["text"]).items()}  # fmt: skip
    vae = {f"first_stage_model.{name}": x for name, x in read(parts["vae"]).items()}
    both = {name: x.clone() for name, x in (read(parts["dit"]) | text | vae).items()}
    save_file(both, tmp_path / "all.safetensors")
    one = dict.fromkeys(("dit", "text", "vae"), tmp_path / "all.safetensors")
    assert (run(load("wan2.1-t2v-1.3b", **one)) == run(load("wan2.1-t2v-1.3b", **parts))).all()


def test_gguf_files_bring_their_tokenizer(parts, tmp_path, model):  # noqa: F811
    dit = write(tmp_path / "dit.gguf", state_of("dit", DIT), kind="q5_0")
    tokens = llama(tmp_path, model)
    state = {llama_name(name): x for name, x in state_of("text", TEXT).items()}
    text = write(tmp_path / "t5.safetensors", state, "t5", "q8_0")
    with pytest.raises(CheckpointError, match="holds no tokenizer.*tokenizer=FOLDER"):
        load("wan2.1-t2v-1.3b", dit=dit, text=text, vae=parts["vae"])

    pipe = load("wan2.1-t2v-1.3b", dit=dit, text=text, vae=parts["vae"], tokenizer=tokenizer_of(tokens))
    assert isinstance(pipe.dit.blocks[0].ffn[0].weight, Blocks)
    assert isinstance(pipe.text.token_embedding.weight, Blocks)
    assert run(pipe).shape == (5, 32, 32, 3)


def test_two_experts_are_two_files(parts, tmp_path):
    files = {}
    for i, noise in enumerate(("high", "low")):
        save_file(state_of("dit", DIT, seed=i), tmp_path / f"{noise}.safetensors")
        files[noise] = tmp_path / f"{noise}.safetensors"
    pipe = load("wan2.2-t2v-a14b", dit=files, text=parts["text"], vae=parts["vae"])
    assert isinstance(pipe.dit, Experts) and run(pipe).shape == (5, 32, 32, 3)
    with pytest.raises(ValueError, match="has two dits; expected dit={'high': FILE, 'low': FILE}"):
        load("wan2.2-t2v-a14b", dit=files["high"], text=parts["text"], vae=parts["vae"])
    with pytest.raises(ValueError, match="has one dit; expected dit=FILE"):
        load("wan2.1-t2v-1.3b", dit=files, text=parts["text"], vae=parts["vae"])


def test_what_is_missing_or_misplaced_is_said_before_anything_is_loaded(parts, tmp_path):
    with pytest.raises(CheckpointError, match=r"not among those you gave: text.*hf download"):
        load("wan2.1-t2v-1.3b", dit=parts["dit"], vae=parts["vae"])
    with pytest.raises(ValueError, match=r"c.safetensors.pth is a vae, and was given as dit="):
        load("wan2.1-t2v-1.3b", **parts | {"dit": parts["vae"]})
    with pytest.raises(ValueError, match=r"is for t2v, and wan2.1-i2v-14b-480p is a model for i2v"):
        load("wan2.1-i2v-14b-480p", dit=parts["dit"])
    with pytest.raises(CheckpointError, match="there is no weights file at"):
        load("wan2.1-t2v-1.3b", **parts | {"dit": "nowhere.safetensors"})
    with pytest.raises(
        ValueError, match=r"one file, and .* a dit \(nearest to wan2.1-t2v-1.3b\): moddiff.lo"
    ):
        load(parts["dit"])
    save_file({"blocks.0.ffn.0.lora_A.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match="a LoRA"):
        load("wan2.1-t2v-1.3b", **parts | {"dit": tmp_path / "lora.safetensors"})


def test_a_component_is_loaded_without_a_config(parts, tmp_path):
    assert load_component(parts["dit"], "dit").config == configs.read("dit", DIT)
    with pytest.raises(WeightsError, match="is a vae component, and a dit was asked for"):
        load_component(parts["vae"], "dit")
    # A config.json beside it goes before.
    (tmp_path / "config.json").write_text(json.dumps(DIT | {"eps": 1e-5}))
    assert load_component(parts["dit"], "dit").config.eps == 1e-5


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-i2v-a14b", "wan2.1-vace-14b", "wan2.2-ti2v-5b"])
def test_the_releases_that_a_part_goes_with_are_found(name, parts):
    part = part_of(parts["dit"])
    entry = preset(name)
    for kind in ("dit", "text", "vae"):
        found, equal = goes_with(part.__class__(kind, configs.read(kind, entry[kind])))
        assert equal and name in found
    assert goes_with(part) == (["wan2.1-t2v-1.3b"], False)


def test_a_part_of_the_tiny_model_is_taken_from_a_file(tmp_path):
    tiny = load("tiny")
    for kind in ("dit", "vae", "text"):
        save_file(getattr(tiny, kind).state_dict(), tmp_path / f"{kind}.safetensors")
    files = {kind: tmp_path / f"{kind}.safetensors" for kind in ("dit", "vae", "text")}
    again = load("tiny", **files)
    assert all(getattr(again, kind).config == getattr(tiny, kind).config for kind in files)
    options = dict(steps=2, frames=5, size=(32, 48), seed=0)
    assert (again("a red circle", **options).frames == tiny("a red circle", **options).frames).all()


def test_one_gguf_file_brings_weights_and_tokenizer(parts, tmp_path, model):  # noqa: F811
    tokens = gguf.GGUFReader(str(llama(tmp_path, model))).fields
    writer = gguf.GGUFWriter(str(tmp_path / "t5.gguf"), "t5encoder")
    for name in ("model", "tokens", "scores", "token_type"):
        value = tokens[f"tokenizer.ggml.{name}"].contents()
        (writer.add_string if isinstance(value, str) else writer.add_array)(f"tokenizer.ggml.{name}", value)
    for name, x in state_of("text", TEXT).items():
        writer.add_tensor(llama_name(name), x.half().numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    pipe = load("wan2.1-t2v-1.3b", **parts | {"text": tmp_path / "t5.gguf"})
    assert run(pipe).shape == (5, 32, 32, 3) and pipe.text.tokenizer.path.name == "t5.gguf"
