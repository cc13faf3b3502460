"""Is a folder recognised for what it is, and does every preset say what its release says?"""

import json

import pytest
import torch
from moddiff.checkpoints import CheckpointError
from moddiff.keymaps import RELEASED_PREFIX
from moddiff.releases import open_release, preset, presets
from safetensors.torch import save_file

from moddiff import configs, releases
from moddiff.extensions import adapted
from moddiff.tiny import score, world
from moddiff.weights import build, load, rename

DIT = dict(
    model_type="t2v",
    in_dim=16,
    dim=16,
    ffn_dim=24,
    freq_dim=256,
    text_dim=8,
    out_dim=16,
    num_heads=2,
    num_layers=2,
    eps=1e-6,
)
I2V = DIT | dict(model_type="i2v", in_dim=36)
TEXT = dict(vocab=20, dim=8, dim_attn=8, dim_ffn=12, num_heads=2, num_layers=1)
IMAGE = dict(image_size=8, patch_size=4, dim=8, mlp_ratio=2, out_dim=6, num_heads=2, num_layers=2)
VAE = dict(dim=4, z_dim=16, num_res_blocks=1)
SMALL = {"text": TEXT, "image": IMAGE, "vae": VAE}
DIFFUSERS = {
    "transformer": {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 8,
        "freq_dim": 256,
        "ffn_dim": 24,
        "num_layers": 2,
        "image_dim": None,
        "added_kv_proj_dim": None,
    },
    "vae": {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16, "num_res_blocks": 1},
    "text_encoder": {
        "model_type": "umt5",
        "vocab_size": 20,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_heads": 2,
        "num_layers": 1,
    },
    "image_encoder": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "projection_dim": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "hidden_act": "gelu",
    },
}
KIND = {
    "transformer": "dit",
    "transformer_2": "dit",
    "vae": "vae",
    "text_encoder": "text",
    "image_encoder": "image",
}
RELEASED = [
    "wan2.1-flf2v-14b-720p",
    "wan2.1-i2v-14b-480p",
    "wan2.1-i2v-14b-720p",
    "wan2.1-t2v-14b",
    "wan2.1-t2v-1.3b",
    "wan2.1-vace-14b",
    "wan2.1-vace-1.3b",
    "wan2.2-i2v-a14b",
    "wan2.2-t2v-a14b",
    "wan2.2-ti2v-5b",
]


def use_small_parts(monkeypatch):
    """Official folders have a config for the dit alone, the other parts are as in the presets: small here."""
    monkeypatch.setattr(releases, "preset", lambda name: preset(name) | SMALL)


def state(kind, config, naming, seed=0):
    torch.manual_seed(seed)
    return rename(build(kind, config).state_dict(), kind, naming, config)


def official(folder, dit=DIT, experts=(), clip=False):
    """A folder as Wan-AI lays it out, with small models in it."""
    config = {name: value for name, value in dit.items() if name not in ("text_dim", "image_dim")} | {
        "_class_name": "WanModel"
    }
    for i, place in enumerate([folder / sub for sub in experts] or [folder]):
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(config | {"text_dim": 8}))
        save_file(state("dit", dit, "official", seed=i), place / "diffusion_pytorch_model.safetensors")
    torch.save(state("text", TEXT, "official"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(state("vae", VAE, "official"), folder / "Wan2.1_VAE.pth")
    if clip:
        torch.save(
            state("image", IMAGE, "official"),
            folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        )
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    return folder


def diffusers(folder, experts=1, clip=False, **index):
    """A folder as Diffusers lays it out."""
    subs = (
        ["transformer", "vae", "text_encoder"] + ["transformer_2"] * (experts == 2) + ["image_encoder"] * clip
    )
    named = {sub: ["diffusers", "X"] for sub in subs}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "transformer_2": [None, None]} | named | index)
    )
    for sub in subs:
        (folder / sub).mkdir()
        config = DIFFUSERS["transformer" if sub == "transformer_2" else sub]
        (folder / sub / "config.json").write_text(json.dumps(config))
        save_file(
            {
                name: x
                for name, x in state(KIND[sub], config, "diffusers", seed=len(sub)).items()
                if name != "encoder.embed_tokens.weight"
            },
            folder
            / sub
            / ("model.safetensors" if "encoder" in sub else "diffusion_pytorch_model.safetensors"),
        )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 3.0}')
    return folder


# The presets.


def test_every_release_of_the_family_has_a_preset():
    assert set(RELEASED) <= set(presets())


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_is_complete_and_its_configs_can_be_read(name):
    found = preset(name)
    assert found["name"] == name and found["about"] and found["task"] == found["dit"]["model_type"]
    for kind in ("dit", "text", "vae", *(["image"] if "image" in found else [])):
        configs.read(kind, found[kind])
    dit, vae = configs.read("dit", found["dit"]), configs.read("vae", found["vae"])
    assert ("image" in found) == (dit.image_dim is not None)
    assert dit.out_dim == vae.z_dim and dit.text_dim == found["text"]["dim"]
    assert dit.in_dim == dit.out_dim + (
        4 + vae.z_dim if found["task"] in ("i2v", "flf2v") else 0
    )  # noise, and mask and image
    sampling = found["sampling"]
    assert sampling["frames"] % 4 == 1 and sampling["solver"] == "unipc"
    for height, width in sampling["sizes"] + [sampling["size"]]:
        assert height % (2 * vae.stride[1]) == 0 and width % (2 * vae.stride[2]) == 0
    assert ("boundary" in sampling) == isinstance(sampling["scale"], list) == ("a14b" in name)


@pytest.mark.parametrize(
    "name, steps, shift, scale, frames, fps, size",
    [
        ("wan2.1-t2v-1.3b", 50, 5, 5, 81, 16, (480, 832)),
        ("wan2.1-t2v-14b", 50, 5, 5, 81, 16, (720, 1280)),
        ("wan2.1-i2v-14b-480p", 40, 3, 5, 81, 16, (480, 832)),
        ("wan2.1-i2v-14b-720p", 40, 5, 5, 81, 16, (720, 1280)),
        ("wan2.1-flf2v-14b-720p", 50, 16, 5, 81, 16, (720, 1280)),
        ("wan2.1-vace-1.3b", 50, 16, 5, 81, 16, (480, 832)),
        ("wan2.2-t2v-a14b", 40, 12, (3, 4), 81, 16, (720, 1280)),
        ("wan2.2-i2v-a14b", 40, 5, (3.5, 3.5), 81, 16, (720, 1280)),
        ("wan2.2-ti2v-5b", 50, 5, 5, 121, 24, (704, 1280)),
    ],
)
def test_the_sampling_defaults_are_the_official_ones(name, steps, shift, scale, frames, fps, size):
    found = open_release(name)
    keys = ("steps", "shift", "scale", "frames", "fps", "size")
    assert tuple(found.sampling[key] for key in keys) == (steps, shift, scale, frames, fps, size)


def test_the_720p_image_model_uses_shift_3_at_480p():
    sampling = open_release("wan2.1-i2v-14b-720p").sampling
    assert sampling["shift"] == 5
    assert sampling["shifts"] == [[[480, 832], 3.0], [[832, 480], 3.0]]


def test_the_negative_prompts_differ_as_the_official_ones_do():
    plain = preset("wan2.1-t2v-1.3b")["negative"]
    assert plain.startswith("色调艳丽，") and plain.endswith("倒着走")
    assert preset("wan2.1-i2v-14b-480p")["negative"] == "镜头晃动，" + plain
    assert preset("wan2.1-flf2v-14b-720p")["negative"] == "镜头切换，镜头晃动，" + plain
    assert preset("wan2.2-i2v-a14b")["negative"] == plain


def test_the_two_expert_presets_have_both_and_their_boundary():
    found = open_release("wan2.2-t2v-a14b")
    assert set(found.parts) == {"dit", "dit_low", "text", "vae"} and found.sampling["boundary"] == 0.875
    assert open_release("wan2.2-i2v-a14b").sampling["boundary"] == 0.9


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(
        ValueError, match=r"'wan2.1-t2v-13b' is neither a folder nor a preset \(did you mean 'wan2.1-t2v-1"
    ):
        open_release("wan2.1-t2v-13b")
    with pytest.raises(ValueError, match="there is no preset 'nothing'"):
        preset("nothing")


def test_a_preset_without_weights_says_where_to_get_them_from():
    with pytest.raises(
        CheckpointError, match="holds no weights. Fetch them: hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir"
    ):
        open_release("wan2.1-t2v-1.3b").load("dit")


def test_a_preset_may_bring_its_weights(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    for kind, config in (("dit", DIT), ("text", TEXT), ("vae", VAE)):
        save_file(state(kind, config, "ours"), tmp_path / "tiny" / f"{kind}.safetensors")
    found = {
        "name": "tiny-test",
        "about": "a test",
        "task": "t2v",
        "dit": DIT,
        "text": TEXT,
        "vae": VAE,
        "sampling": preset("wan2.1-t2v-1.3b")["sampling"],
        "negative": "",
        "weights": {
            "folder": "tiny",
            "dit": "dit.safetensors",
            "text": "text.safetensors",
            "vae": "lost.safetensors",
        },
    }
    (tmp_path / "tiny-test.json").write_text(json.dumps(found))
    monkeypatch.setattr(releases, "PRESETS", tmp_path)
    monkeypatch.setattr(releases, "PACKAGE", tmp_path)
    release = open_release("tiny-test")
    assert torch.equal(
        release.load("dit").patch_embedding.weight, state("dit", DIT, "ours")["patch_embedding.weight"]
    )
    assert (
        "vae: lost.safetensors is not in" in release.missing[0] and "install it again" in release.missing[0]
    )
    with pytest.raises(CheckpointError, match="lost.safetensors is not in"):
        release.load("vae")


# Folders.


def test_an_official_folder_is_understood(tmp_path, monkeypatch):
    use_small_parts(monkeypatch)
    found = open_release(official(tmp_path / "Wan2.1-T2V-Small"))
    assert (found.layout, found.task, found.missing, list(found.parts)) == (
        "official",
        "t2v",
        [],
        ["dit", "text", "vae"],
    )
    assert found.tokenizer == tmp_path / "Wan2.1-T2V-Small" / "google" / "umt5-xxl" / "tokenizer.json"
    assert found.name == "Wan2.1-T2V-Small" and "not one of the released models" in found.notes[0]
    expected = state("dit", DIT, "ours")
    assert all(torch.equal(x, expected[name]) for name, x in found.load("dit").state_dict().items())
    assert found.load("vae", dtype="bf16").conv1.weight.dtype == torch.bfloat16


def test_two_experts_are_told_apart(tmp_path, monkeypatch):
    use_small_parts(monkeypatch)
    found = open_release(official(tmp_path / "x", experts=("high_noise_model", "low_noise_model")))
    assert (
        list(found.parts) == ["dit", "dit_low", "text", "vae"]
        and found.sampling["boundary"] == 0.875
        and len(found.sampling["scale"]) == 2
    )
    assert torch.equal(
        found.load("dit").patch_embedding.weight, state("dit", DIT, "ours", seed=0)["patch_embedding.weight"]
    )
    assert torch.equal(
        found.load("dit_low").patch_embedding.weight,
        state("dit", DIT, "ours", seed=1)["patch_embedding.weight"],
    )


@pytest.mark.parametrize("clip", [True, False])
def test_an_official_i2v_folder_has_a_clip_tower_only_if_its_transformer_reads_one(
    tmp_path, clip, monkeypatch
):
    use_small_parts(monkeypatch)
    found = open_release(official(tmp_path / "x", I2V | dict(image_dim=1280 if clip else None), clip=clip))
    assert found.missing == [] and ("image" in found.parts) == clip
    assert found.parts["dit"].config.image_dim == (1280 if clip else None)
    if clip:
        assert found.load("image").config.image_size == 8


def test_a_diffusers_folder_is_understood(tmp_path):
    found = open_release(diffusers(tmp_path / "x"))
    assert (found.layout, found.task, found.missing, list(found.parts)) == (
        "diffusers",
        "t2v",
        [],
        ["dit", "text", "vae"],
    )
    assert any("the scheduler config says shift 3.0" in note for note in found.notes)
    expected = state("dit", DIFFUSERS["transformer"], "ours", seed=len("transformer"))
    assert all(torch.equal(x, expected[name]) for name, x in found.load("dit").state_dict().items())
    assert found.load("vae").config.dim == 4


def test_a_diffusers_folder_with_two_experts_names_its_boundary(tmp_path):
    found = open_release(diffusers(tmp_path / "x", experts=2, boundary_ratio=0.77))
    assert "dit_low" in found.parts and found.sampling["boundary"] == 0.77
    assert not torch.equal(
        found.load("dit").patch_embedding.weight, found.load("dit_low").patch_embedding.weight
    )


@pytest.mark.parametrize(
    "sub, kind",
    [("transformer", "dit"), ("vae", "vae"), ("text_encoder", "text"), ("image_encoder", "image")],
)
def test_each_diffusers_config_and_state_belong_together(tmp_path, sub, kind):
    stored = state(kind, DIFFUSERS[sub], "diffusers")
    prefix = RELEASED_PREFIX.get((kind, "diffusers"), "")
    assert any(name.startswith(prefix) for name in stored) and build(kind, DIFFUSERS[sub], stored) is not None


@pytest.mark.parametrize(
    "name, expected", [("Wan2.1-I2V-14B-480P", "wan2.1-i2v-14b-480p"), ("my_720p", "wan2.1-i2v-14b-720p")]
)
def test_a_released_model_is_recognised_by_its_config_and_480p_from_720p_by_the_folder(
    tmp_path, name, expected
):
    folder = tmp_path / name
    folder.mkdir()
    dit = preset("wan2.1-i2v-14b-480p")["dit"]
    (folder / "config.json").write_text(
        json.dumps(
            {
                key: dit[key]
                for key in (
                    "model_type",
                    "in_dim",
                    "dim",
                    "ffn_dim",
                    "freq_dim",
                    "out_dim",
                    "num_heads",
                    "num_layers",
                    "text_len",
                    "eps",
                )
            }
        )
    )
    found = open_release(folder)
    assert found.name == expected and found.parts["image"].config.dim == 1280


# What is missing is said.


def test_every_absent_part_is_named_with_the_place_it_should_be_in(tmp_path, monkeypatch):
    use_small_parts(monkeypatch)
    folder = official(tmp_path / "x")
    for name in (
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
        "diffusion_pytorch_model.safetensors",
        "google/umt5-xxl/tokenizer.json",
    ):
        (folder / name).unlink()
    missing = "\n".join(open_release(folder).missing)
    assert (
        "dit: there is no weights file at" in missing
        and "text: there is no weights file at" in missing
        and "Wan2.1_VAE.pth" in missing
    )
    assert "tokenizer: no tokenizer.json under" in missing


def test_a_damaged_part_is_reported_and_the_others_still_load(tmp_path, monkeypatch):
    use_small_parts(monkeypatch)
    folder = official(tmp_path / "x")
    path = folder / "Wan2.1_VAE.pth"
    path.write_bytes(path.read_bytes()[:5000])
    found = open_release(folder)
    assert len(found.missing) == 1 and "Wan2.1_VAE.pth is damaged or cut off" in found.missing[0]
    found.load("dit")
    with pytest.raises(CheckpointError, match="the vae of x cannot be loaded: .*damaged or cut off"):
        found.load("vae")
    with pytest.raises(KeyError, match="x has no part 'image'; it has dit, text, vae"):
        found.load("image")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ValueError, match="is not a Wan release: it holds notes.txt. Expected an official folder"
    ):
        open_release(tmp_path)
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "Flux"]}'
    )
    with pytest.raises(ValueError, match="its class is FluxPipeline"):
        open_release(tmp_path)


def test_a_part_without_its_config_is_listed_and_so_is_a_cousin(tmp_path):
    folder = diffusers(tmp_path / "x")
    (folder / "vae" / "config.json").unlink()
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 48}))
    vae, dit = sorted(open_release(folder).missing, reverse=True)
    assert vae.startswith("vae: there is no config.json in ")
    assert dit.startswith(f"dit: {config}: the dit config says in_dim = 48") and "Wan-Fun" in dit
    with pytest.raises(CheckpointError, match="(?s)x cannot be loaded:.*Wan-Fun"):
        load(folder)


def test_an_official_folder_that_has_only_begun_to_arrive_says_what_is_missing(tmp_path, monkeypatch):
    use_small_parts(monkeypatch)
    folder = official(tmp_path / "Wan2.1-T2V-1.3B")
    (folder / "config.json").unlink()
    found = open_release(folder)
    assert found.layout == "official" and [line.split(":")[0] for line in found.missing] == ["dit"]
    assert "there is no config.json in" in found.missing[0]
    assert "sampling defaults are those of wan2.1-t2v-1.3b" in found.notes[0]


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("data", [b'{"cut', b"[]", b"\xff", b"[" * 10**5], ids=range(4))
def test_a_damaged_file_about_the_release_is_named(tmp_path, name, data):
    folder = diffusers(tmp_path / "x")
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        open_release(folder)


@pytest.mark.parametrize(
    "index, words",
    [
        (dict(transformer=[]), "model_index.json names no transformer"),
        (dict(transformer={"a": 1}, vae=None), "model_index.json names no transformer, vae"),
        (dict(boundary_ratio="0.9"), "boundary_ratio = 0.9; expected a number between 0 and 1"),
        (dict(boundary_ratio=float("nan")), "boundary_ratio = nan; expected a number between 0 and 1"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused_in_words(tmp_path, index, words):
    with pytest.raises(ValueError, match=words):
        open_release(diffusers(tmp_path / "x", experts=2, **index))


def test_a_config_that_contradicts_itself_keeps_the_other_parts(tmp_path, monkeypatch):
    use_small_parts(monkeypatch)
    folder = official(tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_dim": 6}))
    (line,) = open_release(folder).missing
    assert line.startswith("dit: ") and "config.json: " in line and "reads no CLIP features" in line


def test_a_folder_in_the_home_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    diffusers(tmp_path / "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_release("~/x").folder == tmp_path / "x"


# Where to get what is not here.


@pytest.mark.parametrize("name", RELEASED)
def test_a_release_that_is_not_here_says_how_to_fetch_it(name):
    hub = preset(name)["hub"]
    assert hub.startswith("Wan-AI/Wan2.") and hub.split("/")[1].lower() == name
    for asked in (name, hub, f"{hub}-Diffusers"):
        with pytest.raises(CheckpointError) as error:
            load(asked)
        fetched = hub if asked == name else asked
        folder = fetched.split("/")[1]
        assert f"hf download {fetched} --local-dir {folder}, then moddiff.load('{folder}')" in str(
            error.value
        )


def test_a_single_file_and_a_folder_of_single_files_say_how_they_become_a_model(tmp_path):
    (tmp_path / "diffusion_models").mkdir()
    path = tmp_path / "diffusion_models" / "wan.safetensors"
    save_file(state("dit", DIT, "official"), path)
    with pytest.raises(
        ValueError, match="16 wide, and how many heads it has is in no shape.*Give its config"
    ):
        load(path)
    with pytest.raises(
        ValueError, match="(?s)a folder of ComfyUI.*wan.safetensors is passed over: .*16 wide.*moddiff.load"
    ):
        load(tmp_path)


# Arguments of load.


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(torch_dtype=torch.float16), "load has no torch_dtype=; here it is dtype="),
        (dict(device_map="cuda"), "load has no device_map=; here it is device="),
        (dict(transformer=None), "load has no transformer=; here it is dit="),
        (dict(text_encoder=None), "load has no text_encoder=; here it is text="),
        (dict(scheduler=None), "load has no scheduler=; here it is solver=, in the call"),
        (
            dict(quantization="int8"),
            "load was given a component for quantization; there are text, image, dit, vae",
        ),
        (dict(dtype={"unet": "fp16"}), "load was given a dtype for unet; there are text, image, dit, vae"),
    ],
)
def test_an_argument_that_load_does_not_have_is_answered_with_ours(given, words):
    with pytest.raises(TypeError, match=words):
        load("tiny", **given)


@pytest.mark.parametrize("model", ["tiny-t2v", "tiny-i2v"])
def test_the_tiny_vae_is_not_loaded_into_a_dtype_it_overflows(model):
    with pytest.raises(ValueError, match="the vae of tiny.* reaches values of 2e.06 .* take bf16 or fp32"):
        load(model, dtype={"vae": "fp16"})
    assert load(model, dtype="fp16").vae.conv1.weight.dtype == torch.float32
    pipe = load(model, dtype={"vae": "bf16"})
    assert pipe.decode(torch.zeros(1, 16, 2, 4, 4)).frames.shape == (5, 32, 32, 3)


def test_the_peak_in_the_preset_is_what_the_vae_reaches():
    vae, reached = load("tiny").vae, []
    for module in vae.modules():
        module.register_forward_hook(lambda module, given, out: reached.append(float(out.abs().max())))
    with torch.no_grad():
        vae.decode(torch.randn(1, 16, 2, 12, 12, generator=torch.Generator().manual_seed(0)))
    assert torch.finfo(torch.float16).max < max(reached) < 2 * preset("tiny-t2v")["peaks"]["vae"]


# ---- an adapter that belongs to a release ---------------------------------------------------------------


def test_tiny_fast_is_tiny_with_an_adapter_and_the_run_that_it_was_made_for():
    fast, tiny = load("tiny-fast"), load("tiny")
    assert "adapted" in repr(fast.dit) and fast.name == "tiny-fast"
    assert len(fast.defaults["steps"]) == 4 and fast.defaults["solver"] == "euler"
    assert fast.defaults["scale"] == 1 and tiny.defaults["scale"] == 4 and tiny.defaults["steps"] == 20
    # Put onto the dit of another pipeline, the file brings the same settings.
    file = open_release("tiny-fast").adapters["dit"]
    assert tiny.replace(dit=adapted(tiny.dit, file)).defaults == fast.defaults
    asked, passes = "a red circle moving left on a black background", []
    fast.dit.register_forward_pre_hook(lambda *_: passes.append(1))
    video = fast(asked, seed=0)
    assert len(passes) == 4 and not video.notes
    assert score.judge(video.frames, world.parse(asked))["all"]


def test_a_dit_of_ones_own_comes_without_the_adapter_of_the_release():
    dit = load("tiny").dit
    assert load("tiny-fast", dit=dit).defaults["steps"] == 20


def test_an_adapter_that_is_not_there_is_missed_before_anything_is_loaded(tmp_path, monkeypatch):
    entry = preset("tiny-fast")
    entry["weights"]["adapters"]["dit"] = "absent.safetensors"
    monkeypatch.setattr(releases, "preset", lambda name: entry)
    with pytest.raises(CheckpointError, match="dit: its adapter absent.safetensors is not in"):
        load("tiny-fast")
