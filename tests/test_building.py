"""Does a state find its place whatever its names, and is what does not fit said in words?"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moddiff import weights
from moddiff.weights import WeightsError, build, load_component, rename

DIT = dict(
    model_type="t2v",
    in_dim=4,
    dim=16,
    ffn_dim=24,
    freq_dim=8,
    text_dim=12,
    out_dim=4,
    num_heads=2,
    num_layers=2,
    text_len=16,
)
TEXT = dict(vocab=20, dim=8, dim_attn=8, dim_ffn=12, num_heads=2, num_layers=2)
IMAGE = dict(image_size=8, patch_size=4, dim=8, mlp_ratio=2, out_dim=6, num_heads=2, num_layers=2)
VAE = dict(dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True])
CONFIGS = {"dit": DIT, "text": TEXT, "image": IMAGE, "vae": VAE}


def state_of(kind, naming="official", config=None, seed=0):
    torch.manual_seed(seed)
    config = config or CONFIGS[kind]
    return rename(build(kind, config).state_dict(), kind, naming, config)


def refused(kind, state, config=None, **options):
    with pytest.raises(WeightsError) as error:
        build(kind, config or CONFIGS[kind], state, **options)
    return str(error.value)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("naming", ["ours", "official", "diffusers"])
def test_every_naming_builds_the_same_module(kind, naming):
    module = build(kind, CONFIGS[kind], state_of(kind, naming))
    expected = state_of(kind, "ours")
    assert not module.training
    assert all(torch.equal(x, expected[name]) for name, x in module.state_dict().items())


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 3),
    half=st.integers(3, 5),
    layers=st.integers(1, 3),
    task=st.sampled_from(["t2v", "i2v", "flf2v", "ti2v", "vace"]),
)
def test_renaming_there_and_back_loses_nothing_for_any_size(heads, half, layers, task):
    extra = {
        "i2v": dict(in_dim=12, image_dim=6),
        "flf2v": dict(in_dim=12, image_dim=6),
        "vace": dict(vace_layers=list(range(0, layers, 2)), vace_in_dim=5),
    }
    config = (
        DIT
        | dict(dim=2 * heads * half, num_heads=heads, num_layers=layers, model_type=task)
        | extra.get(task, {})
    )
    ours = build("dit", config).state_dict()
    for through in ("official", "diffusers"):
        back = rename(rename(ours, "dit", through, config), "dit", "ours", config)
        assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_the_cross_attention_norm_is_not_taken_for_the_ffn_norm():
    official, diffusers = state_of("dit", "official"), state_of("dit", "diffusers")
    official["blocks.1.norm3.weight"] += 1
    diffusers["blocks.1.norm2.weight"] += 1
    a, b = build("dit", DIT, official), build("dit", DIT, diffusers)
    assert (
        torch.equal(a.blocks[1].norm_cross.weight, b.blocks[1].norm_cross.weight)
        and a.blocks[1].norm_cross.weight.mean() > 1.5
    )


@pytest.mark.parametrize(
    "kind, prefix",
    [
        ("dit", "model.diffusion_model."),
        ("dit", "diffusion_model."),
        ("vae", "first_stage_model."),
        ("image", "visual."),
    ],
)
def test_a_prefix_before_every_name_is_seen_through(kind, prefix):
    state = {prefix + name.removeprefix("visual."): x for name, x in state_of(kind).items()}
    expected = state_of(kind, "ours")
    assert all(
        torch.equal(x, expected[name]) for name, x in build(kind, CONFIGS[kind], state).state_dict().items()
    )


def test_the_other_tower_of_clip_is_left_aside_by_rule():
    state = state_of("image") | {
        "textual.blocks.0.attn.q.weight": torch.zeros(3),
        "log_scale": torch.zeros(()),
    }
    assert build("image", IMAGE, state).head.shape == (8, 6)
    said = refused("image", state | {"visual.extra": torch.zeros(1)})
    assert "official names behind 'visual.'" in said and "1 surplus, no place for: extra" in said


def test_an_old_export_with_norm_added_q_is_accepted():
    config = DIT | dict(model_type="i2v", in_dim=12, image_dim=6)
    state = state_of("dit", "diffusers", config) | {"blocks.0.attn2.norm_added_q.weight": torch.zeros(16)}
    assert build("dit", config, state).image_mlp is not None


def test_the_tied_embedding_may_come_under_one_name_or_both():
    both = state_of("text", "diffusers")
    one = {name: x for name, x in both.items() if name != "encoder.embed_tokens.weight"}
    other = {name: x for name, x in both.items() if name != "shared.weight"}
    for state in (both, one, other):
        assert torch.equal(build("text", TEXT, state).token_embedding.weight, both["shared.weight"])
    torn = both | {"encoder.embed_tokens.weight": both["shared.weight"] + 1}
    assert "shared.weight and encoder.embed_tokens.weight should be one tensor, but differ" in refused(
        "text", torn
    )


def test_without_a_projection_the_vision_tower_still_builds():
    state = {
        name: x
        for name, x in state_of("image", "diffusers").items()
        if not name.startswith("visual_projection")
    }
    assert build("image", IMAGE, state).head is None
    official = {name: x for name, x in state_of("image").items() if name != "visual.head"}
    assert "1 missing: head [8, 6]" in refused("image", official)  # an official file always has it


def test_a_wan_2_1_and_a_wan_2_2_i2v_are_told_apart_by_their_tensors():
    bare = {name: value for name, value in DIT.items()} | dict(model_type="i2v", in_dim=12)
    with_clip = rename(
        build("dit", bare | dict(image_dim=1280)).state_dict(), "dit", "official", bare | dict(image_dim=1280)
    )
    without = rename(
        build("dit", bare | dict(image_dim=None)).state_dict(), "dit", "official", bare | dict(image_dim=None)
    )
    assert build("dit", bare, with_clip).config.image_dim == 1280
    assert build("dit", bare, without).config.image_dim is None


def test_the_module_uses_the_tensors_it_was_given():
    state = state_of("dit")
    module = build("dit", DIT, state)
    assert module.patch_embedding.weight.data_ptr() == state["patch_embedding.weight"].data_ptr()


def test_dtype_converts_every_weight():
    assert {x.dtype for x in build("text", TEXT, state_of("text"), dtype="bf16").state_dict().values()} == {
        torch.bfloat16
    }
    assert build("text", TEXT, dtype=torch.float64).norm.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of fp32, bf16, fp16"):
        build("text", TEXT, dtype="int8")


# What does not fit, said in words.


def test_missing_weights_are_named_in_the_file_s_own_naming_with_their_shapes():
    state = state_of("dit", "diffusers")
    del state["blocks.1.attn1.to_q.weight"], state["proj_out.bias"]
    said = refused("dit", state)
    assert (
        "Diffusers names" in said
        and "2 missing: blocks.1.attn1.to_q.weight [16, 16]; proj_out.bias [16]" in said
    )


def test_a_misspelt_name_is_missing_and_surplus_and_the_two_are_brought_together():
    state = state_of("dit")
    state["blocks.0.self_attn.key.weight"] = state.pop("blocks.0.self_attn.k.weight")
    said = refused("dit", state)
    assert "1 missing: blocks.0.self_attn.k.weight [16, 16]" in said
    assert "1 surplus, no place for: blocks.0.self_attn.key.weight" in said
    assert "is blocks.0.self_attn.key.weight meant for blocks.0.self_attn.k.weight?" in said


def test_a_misshapen_weight_says_both_shapes_and_the_field_it_contradicts():
    said = refused("dit", state_of("dit"), DIT | dict(ffn_dim=32))
    assert "blocks.0.ffn.0.weight is [24, 16], expected [32, 16]" in said
    assert (
        "the config says ffn_dim = 32, the weights say 24" in said and "Correct the config's ffn_dim" in said
    )


def test_input_channels_that_contradict_the_patch_weight_are_named():
    said = refused("dit", state_of("dit"), DIT | dict(in_dim=8, out_dim=8))
    assert "the config says in_dim = 8, the weights say 4 (axis 1 of patch_embedding.weight)" in said


@pytest.mark.parametrize("layers", [1, 3])
def test_a_wrong_number_of_layers_is_named(layers):
    said = refused("dit", state_of("dit"), DIT | dict(num_layers=layers))
    assert f"the config says num_layers = {layers}, the weights say 2" in said
    assert ("surplus" if layers == 1 else "missing") in said and "more" in said


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_broken_values_are_named_and_counted(bad):
    state = state_of("vae")
    state["decoder.conv1.weight"].view(-1)[[0, 5]] = bad
    said = refused("vae", state)
    assert "1 broken" in said and "decoder.conv1.weight (2 of" in said and "fetch it again" in said
    assert build("vae", VAE, state, check_values=False) is not None


def test_a_scale_that_belongs_to_no_8_bit_weight_is_an_error():
    said = refused("dit", state_of("dit") | {"blocks.0.ffn.0.scale_weight": torch.ones(())})
    assert "1 surplus, no place for: blocks.0.ffn.0.scale_weight" in said
    assert "belong to no 8 bit weight" in said


def test_a_lora_is_not_a_model():
    said = refused("dit", state_of("dit") | {"blocks.0.self_attn.q.lora_down.weight": torch.ones(1)})
    assert "lora tensors are a change to a model" in said


def test_the_wrong_kind_of_file_is_recognised():
    said = refused("dit", {"encoder.downsamples.0.residual.0.gamma": torch.ones(4, 1, 1, 1)})
    assert (
        "none of the 1 names belongs to a dit component" in said and "They look like a vae component" in said
    )
    assert "none of the 0 names" in refused("dit", {})


def test_rename_wants_a_known_naming_and_a_whole_state():
    with pytest.raises(ValueError, match="to = 'hub'; expected one of ours, official, diffusers"):
        rename(state_of("text"), "text", "hub", TEXT)
    state = state_of("text")
    del state["norm.weight"]
    with pytest.raises(WeightsError, match="1 missing: norm.weight"):
        rename(state, "text", "diffusers", TEXT)


def test_an_unknown_kind_says_the_known_ones():
    with pytest.raises(ValueError, match="kind is 'unet'; expected one of dit, text, image, vae"):
        build("unet", {})


def test_one_tensor_with_and_without_a_prefix_is_not_chosen_between():
    state = state_of("dit")
    twice = state | {"module.head.head.bias": torch.ones(16)}
    said = refused("dit", twice)
    assert (
        "head.head.bias and module.head.head.bias are both head.head.bias, and only one can be used" in said
    )
    averaged = {f"model.diffusion_model.{name}": x for name, x in state.items()}
    said = refused("dit", averaged | {"head.head.bias": torch.ones(16)})
    assert "model.diffusion_model.head.head.bias and head.head.bias are both head.head.bias" in said


@pytest.mark.parametrize("naming", ["ours", "official", "diffusers"])
def test_the_names_of_a_compiled_or_parallel_model_are_seen_through(naming):
    state = state_of("dit", naming)
    block = {name.replace("blocks.0.", "blocks.0._orig_mod."): x for name, x in state.items()}
    whole = {f"_orig_mod.{name}": x for name, x in state.items()}
    both = {f"module._orig_mod.{name}": x for name, x in block.items()}
    expected = state_of("dit", "ours")
    for wrapped in (block, whole, both, {f"module.{name}": x for name, x in state.items()}):
        module = build("dit", DIT, wrapped)
        assert all(torch.equal(x, expected[name]) for name, x in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_8_bit_floats_are_kept_or_widened(dtype):
    state = {name: x.to(dtype) for name, x in state_of("text").items()}
    kept = build("text", TEXT, state)
    assert kept.layers[0].attn.q.weight.codes.dtype == dtype and kept.norm.weight.dtype == torch.bfloat16
    module = build("text", TEXT, state, dtype="bf16")
    expected = {
        name: x.to(torch.bfloat16)
        for name, x in build("text", TEXT, state, dtype="fp32").state_dict().items()
    }
    assert all(torch.equal(x, expected[name]) for name, x in module.state_dict().items())
    assert all(
        torch.equal(x, state_of("text", "ours")[name].to(dtype).bfloat16()) for name, x in expected.items()
    )
    state["norm.weight"] = torch.full((8,), float("nan")).to(dtype)
    assert "norm.weight (8 of 8 values)" in refused("text", state, dtype="bf16")


def test_packed_weights_are_said_to_be_quantized():
    state, name = state_of("dit", "diffusers"), "blocks.0.attn1.to_q.weight"
    state |= {name: torch.zeros(128, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(4)}
    said = refused("dit", state)
    assert "neither floats nor a quantization that is read here" in said and "mark a quantized" in said


@pytest.mark.parametrize(
    "odd, words",
    [
        ({5: torch.zeros(1)}, "5 is not a name"),
        ({"a": 1.0}, "a is a float"),
        ({"a": torch.eye(2).to_sparse()}, "a is a torch.sparse_coo tensor"),
    ],
    ids=["number", "float", "sparse"],
)
def test_a_state_of_other_than_names_and_plain_tensors_is_refused(odd, words):
    assert f"not a dictionary of names and plain tensors: {words}" in refused("dit", state_of("dit") | odd)


def test_a_stranger_s_names_reach_the_terminal_harmless_and_short():
    rude = {f"\x1b[2J{i}" + "x" * 10**6: torch.zeros(1) for i in range(50)}
    for state in (state_of("dit") | rude, rude):
        said = refused("dit", state)
        assert said.replace("\n", "").isprintable() and len(said) < 3000


def test_the_hint_says_what_to_do_where_there_is_no_config_json():
    said = refused("text", state_of("text"), TEXT | dict(dim_ffn=16))
    assert "the config says dim_ffn = 16, the weights say 12" in said
    assert "load_component(file, 'text', config) and give it to load as text=" in said
    module = build("text", TEXT | dict(dim_ffn=12), state_of("text"))  # so that it works as said
    assert module.config.dim_ffn == 12


# Loading.


def test_a_component_loads_from_a_folder_and_its_weights_are_windows_into_the_file(tmp_path):
    state = state_of("dit", "diffusers")
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"_class_name": "WanModel", "model_type": "t2v", "in_dim": 4, "dim": 16, "ffn_dim": 24,'
        ' "freq_dim": 8, "text_dim": 12, "out_dim": 4,'
        ' "num_heads": 2, "num_layers": 2, "text_len": 16}'
    )
    module = load_component(tmp_path, "dit")
    expected = build("dit", DIT, state).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in module.state_dict().items())
    if Path("/proc/self/maps").exists():
        maps = [
            line
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(tmp_path / "diffusion_pytorch_model.safetensors"))
        ]
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
        assert all(
            any(start <= x.data_ptr() < end for start, end in ranges) for x in module.state_dict().values()
        )


def test_a_pickled_component_loads_too(tmp_path):
    state = state_of("text")
    torch.save(state, tmp_path / "models_t5.pth")
    module = load_component(tmp_path / "models_t5.pth", "text", TEXT)
    assert all(
        torch.equal(x, build("text", TEXT, state).state_dict()[name])
        for name, x in module.state_dict().items()
    )


def test_inspect_is_reachable_from_here():
    assert weights.inspect("wan2.1-t2v-1.3b").parts["dit"]["parameters"] == 1_418_996_800
