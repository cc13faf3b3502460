"""Does UMT5 in mlx say what ours says, from the same files, and how far off is it with fewer bits?"""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from statistics import median

import mlx.core as mx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small import release
from test_gguf import llama as llama_name
from test_gguf import write
from test_pieces import comfy, model  # noqa: F401  a fixture
from test_releases import SMALL, official
from test_single import TEXT, scaled, state_of
from test_text import unigram

import moddiff
from moddiff import weights
from moddiff.cli import main
from moddiff.contracts import check_component, fact
from moddiff.experiments import experiment
from moddiff.fingerprints import fingerprint
from moddiff.hooks import UnknownTap, capture, patch, scale_by, taps
from moddiff.remote.mlx import Linear, TextEncoder, to_torch
from moddiff.text import TextConfig, Tokenizer
from moddiff.text import TextEncoder as InTorch
from moddiff.tiny.world import prompts
from moddiff.weights import preset, releases
from moddiff.weights.files import read

GOLDEN = Path(__file__).parent / "goldens" / "t5_encoder.safetensors"
PROMPTS = ["a red circle moving left on a black background", "", "un círculo 红色", "a"]
BAR = 1e-4


def ours(seed=0, tokenizer=None, **changes):
    """Our encoder with random weights far from their usual start, so that every part of it is heard."""
    torch.manual_seed(seed)
    sizes = dict(vocab=64, dim=64, dim_attn=96, dim_ffn=160, num_heads=4, num_layers=3, text_len=64)
    text = InTorch(TextConfig(**sizes | changes), tokenizer).eval().requires_grad_(False)
    for name, weight in text.named_parameters():
        spread = {"norm": 0.2, "relative_bias": 1.0, "token_embedding": 1.0}
        weight.normal_(std=next((s for n, s in spread.items() if n in name), weight.shape[-1] ** -0.5))
        if "norm" in name:
            weight += 1
    return text


def largest(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()


def relative(a, b):
    """How far `a` is from `b`: root mean square, as a share of that of b."""
    return ((a.float() - b.float()).square().mean() / b.float().square().mean()).sqrt().item()


# --- the same numbers -------------------------------------------------------------------------------------


def test_hidden_states_equal_the_official_ones_at_every_row_even_padded_ones():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    state = {name.removeprefix("weight."): x for name, x in tensors.items() if name.startswith("weight.")}
    text = weights.build("text", config, state)
    hidden = TextEncoder(text)(tensors["in.ids"], tensors["in.mask"])
    assert largest(hidden, tensors["out.hidden"]) <= BAR
    with torch.no_grad():
        assert largest(hidden, text(tensors["in.ids"], tensors["in.mask"])) <= BAR


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 5),
    width=st.integers(1, 9),
    dim=st.sampled_from([8, 13, 24]),
    layers=st.integers(1, 4),
    length=st.integers(1, 150),
    buckets=st.sampled_from([8, 32, 64]),
    seed=st.integers(0, 9),
)
def test_any_sizes_and_lengths_give_our_hidden_states_with_and_without_padding(
    heads, width, dim, layers, length, buckets, seed
):
    text = ours(
        seed,
        dim=dim,
        dim_attn=heads * width,
        dim_ffn=dim + 5,
        num_heads=heads,
        num_layers=layers,
        num_buckets=buckets,
    )
    there = TextEncoder(text)
    ids = torch.randint(0, 64, (2, length))
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length // 3)]])
    assert largest(there(ids, mask), text(ids, mask)) <= BAR
    assert largest(there(ids), text(ids)) <= BAR
    assert largest(there(ids.int(), mask.long()), text(ids, mask)) <= BAR


def test_a_row_with_nothing_to_hear_stays_a_number():
    there, ids = TextEncoder(ours()), torch.arange(6)[None]
    assert there(ids, torch.zeros(1, 6, dtype=torch.bool)).isfinite().all()


def test_encode_gives_our_rows_in_our_layout(tmp_path):
    text = ours(tokenizer=unigram(tmp_path), text_len=512)
    there = TextEncoder(text)
    asked = [*PROMPTS, "a red circle " * 200]
    rows = there.encode(asked)
    assert [len(row) for row in rows][-1] == 512
    for mine, theirs in zip(text.encode(asked), rows, strict=True):
        assert largest(theirs, mine) <= BAR and theirs.is_contiguous() and not theirs.requires_grad
    alone = there.encode("a red circle")
    assert torch.equal(there.encode(["a", "a red circle"])[1], alone[0]) and there.encode([]) == []
    assert there.tokens(PROMPTS[0]) == text.tokens(PROMPTS[0])
    assert there.counts(asked[-1]) == text.counts(asked[-1])


def test_it_plays_the_role_of_a_text_encoder_in_a_run():
    pipe = moddiff.load("tiny")
    there = check_component("text", TextEncoder("tiny"))
    assert fact("text", there, "tokens") is not None and there.dim == pipe.text.dim
    how = dict(seed=0, steps=2, frames=5)
    video, expected = pipe.replace(text=there)(PROMPTS[0], **how), pipe(PROMPTS[0], **how)
    off = abs(video.frames.astype(int) - expected.frames.astype(int))
    assert video.frames.shape == expected.frames.shape and off.max() <= 1
    assert [str(word) for word in pipe.replace(text=there).words("a red circle")] == [
        str(word) for word in pipe.words("a red circle")
    ]


def test_another_thread_may_ask_for_what_this_one_has_made():
    there, found = TextEncoder("tiny"), []
    here = there.encode(PROMPTS)
    asks = [threading.Thread(target=lambda: found.append(there.encode(PROMPTS))) for _ in range(3)]
    for ask in asks:
        ask.start()
    for ask in asks:
        ask.join(60)
    assert len(found) == 3 and all(torch.equal(a, b) for rows in found for a, b in zip(rows, here))


# --- fewer bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_in_torch(dtype):
    errors = {"mlx": [], "torch": []}
    for seed in range(4):
        text = ours(seed)
        ids, mask = torch.randint(0, 64, (2, 24)), torch.arange(24)[None] < torch.tensor([[24], [10]])
        truth = text(ids, mask)
        there = TextEncoder(text, dtype=dtype)(ids, mask)
        assert there.dtype == dtype
        errors["mlx"].append(relative(there, truth))
        errors["torch"].append(relative(text.to(dtype)(ids, mask), truth))
    mlx, torchs = (sum(errors[name]) / 4 for name in ("mlx", "torch"))
    print(f"\nUMT5 {dtype}: mlx {mlx:.5f}, torch {torchs:.5f}")
    assert mlx <= torchs * 1.05


def test_a_stream_that_overflows_half_precision_stays_finite():
    text = ours().half()
    for layer in text.layers:
        layer.ffn.down.weight.data.fill_(3e4)
    ids = torch.arange(6)[None]
    there = TextEncoder(text)
    with capture(there, "layers.0.resid_post") as seen:
        assert there(ids).isfinite().all()
    assert seen["layers.0.resid_post"].abs().max() == 65504 - 1000


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_matrix_is_less_than_a_step_from_what_it_was(bits, group_size):
    text = ours(dim=128, dim_attn=128, dim_ffn=256)
    there = TextEncoder(text, bits=bits, group_size=group_size)
    layer, mine = there.layers[0].ffn.down, text.layers[0].ffn.down.weight
    kept = to_torch(mx.dequantize(*layer.kept, **layer.how))
    groups = mine.view(128, -1, group_size)
    # Between the smallest and the largest of a group lie 2 ** bits numbers. The nearest is half a step away;
    # mlx then moves the step so that one end is met, by up to 1 in 2 ** bits, which the far end pays for.
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    assert ((kept - mine).view_as(groups).abs() <= 1.1 * step[..., None]).all()
    ids = torch.arange(64)[None]
    same = InTorch(text.config).eval().requires_grad_(False)
    same.load_state_dict(expanded(there, text))
    assert largest(there(ids), same(ids)) <= 2 * BAR  # the rest is as exact as without


def expanded(there, text):
    """Our state with the numbers that the quantized matrices stand for."""
    state = dict(text.state_dict())
    for name in state:
        here = there
        for piece in name.split(".")[:-1]:
            here = here[int(piece)] if piece.isdigit() else getattr(here, piece)
        if isinstance(here, Linear):
            state[name] = to_torch(mx.dequantize(*here.kept, **here.how))
    return state


def test_eight_bits_are_nearer_than_four_and_small_groups_than_large():
    text = moddiff.load("tiny").text
    captions = [caption for caption, _ in [*prompts(32), *prompts(16, things=2)]]
    truth, state = text.encode(captions), text.state_dict()
    hidden, matrices = {}, {}
    for bits, group in [(8, 32), (8, 64), (4, 32), (4, 64)]:
        there = TextEncoder(text, bits=bits, group_size=group)
        # The median: attention to one of two nearly equal keys can turn over, which shows in a few prompts.
        hidden[bits, group] = median(map(relative, there.encode(captions), truth))
        kept = expanded(there, text)
        off = [relative(kept[name], x) for name, x in state.items() if not torch.equal(kept[name], x)]
        matrices[bits, group] = sum(off) / len(off)
    print("\nbits  numbers a group  error of a matrix  of hidden states (share of their root mean square)")
    for bits, group in hidden:
        print(f"{bits:4}  {group:15}  {matrices[bits, group]:17.2%}  {hidden[bits, group]:.2%}")
    for error in (hidden, matrices):
        assert error[8, 32] < error[8, 64] < error[4, 32] < error[4, 64]
    for group in (32, 64):
        assert 15 < matrices[4, group] / matrices[8, group] < 18  # a step of 4 bits is 255 / 15 = 17 of 8
    # A normal weight's group of 64 spans 4.7 standard deviations: 4.7 / 15 / sqrt(12) = 9 % with 4 bits.
    assert matrices[8, 64] < 0.0065 and matrices[4, 64] < 0.11
    # Of what the matrices of a layer get wrong, most is averaged away: less is left than in one of them.
    assert all(hidden[how] < matrices[how] for how in hidden)


# --- taps -------------------------------------------------------------------------------------------------


def test_taps_have_our_names_and_show_our_values():
    text = ours()
    there, ids = TextEncoder(text), torch.arange(9)[None]
    declared = [[row[:2] for row in taps(part).rows if row[1] != "function"] for part in (there, text)]
    assert declared[0] == declared[1] and len(declared[0]) > 30
    plain = there(ids)
    with capture(text, "*") as mine:
        text(ids)
    with capture(there, "*") as seen:
        looked = there(ids)
    assert torch.equal(looked, plain)  # looking changes no bit
    assert seen.names == mine.names and len(seen.names) == len(declared[0])
    for name in seen.names:
        assert largest(seen[name], mine[name]) <= BAR, name
    with capture(there, "layers.1.attn.probs", blocks=1) as one:
        there(ids)
    assert torch.equal(one["layers.1.attn.probs"], seen["layers.1.attn.probs"])


@pytest.mark.parametrize("name", ["resid_post", "attn.probs", "attn.scores", "attn.bias", "attn.q", "ffn"])
def test_a_patch_changes_what_flows_on_as_it_does_in_ours(name):
    text = ours()
    there, ids, name = TextEncoder(text), torch.arange(9)[None], f"layers.1.{name}"
    results = []
    for part in (there, text):
        with patch(part, name, scale_by(0.5)):
            results.append(part(ids))
    assert largest(*results) <= BAR and largest(results[0], there(ids)) > 100 * BAR


def test_the_function_that_cannot_be_exchanged_is_no_tap():
    with pytest.raises(UnknownTap, match=r"no tap of TextEncoder matches 'layers.0.attn.attend'"):
        with capture(TextEncoder(ours()), "layers.0.attn.attend"):
            pass


def test_an_experiment_takes_it_as_it_takes_ours(tmp_path):
    pipe = moddiff.load("tiny")
    pipe = pipe.replace(text=TextEncoder(pipe.text))
    with experiment("mlx", pipe, file=tmp_path / "e.sqlite"):
        with capture(pipe, "text.layers.3.attn.probs") as seen:
            pipe(PROMPTS[0], seed=0, steps=1, frames=5)
    assert seen.names == ["text.layers.3.attn.probs"]


# --- elsewhere --------------------------------------------------------------------------------------------


def test_it_is_served_from_another_process_with_its_taps_and_its_own_fingerprint():
    command = [sys.executable, "-m", "moddiff", "serve", "--roles", "text", "--port", "0"]
    command += ["--backend", "mlx", "--bits", "8", "--dtype", "fp32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            there = moddiff.remote(server.stdout.readline().split()[-1], "text")
            here = TextEncoder("tiny", bits=8)
            for mine, theirs in zip(here.encode(PROMPTS), there.encode(PROMPTS), strict=True):
                assert torch.equal(mine, theirs)
            assert there.fingerprint == fingerprint(here) != fingerprint(moddiff.load("tiny").text)
            assert there.counts(PROMPTS[0]) == here.counts(PROMPTS[0])
            for part in (here, there):
                with capture(part, "layers.3.attn.probs") as seen:
                    part.encode(PROMPTS[:1])
                part.looked = seen["layers.3.attn.probs"]
            assert torch.equal(here.looked, there.looked)
        finally:
            server.terminate()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--backend", "mlx"], "serves the text encoder alone; --roles text, not text,vae,dit"),
        (["--backend", "mlx", "--roles", "text", "--bits", "5"], "bits=5; expected 4 or 8"),
        (["--backend", "mlx", "--roles", "text", "--device", "cuda"], "--device and --profile are for torch"),
        (["--bits", "4"], "--bits 4 is for --backend mlx"),
        (["--backend", "jax"], "--backend jax; expected torch or mlx"),
    ],
)
def test_what_the_server_cannot_give_is_said_before_it_serves(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--port", "0", *options])
    assert message in " ".join(capsys.readouterr().err.split())


def test_it_is_found_by_its_name_alone():
    code = "import moddiff; print(moddiff.remote.mlx.TextEncoder.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "TextEncoder", done.stderr


# --- the same files ---------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_what_ours_gives_from_it(tmp_path, model):  # noqa: F811
    spiece = read(comfy(tmp_path, model))["spiece_model"]
    state = state_of("text", TEXT)
    (tmp_path / "tokens").mkdir()
    tokens = unigram(tmp_path / "tokens")
    torch.save(state, tmp_path / "models_t5.pth")
    save_file(
        scaled(state_of("text", TEXT, "diffusers")) | {"spiece_model": spiece}, tmp_path / "fp8.safetensors"
    )
    write(tmp_path / "t5.gguf", {llama_name(name): x for name, x in state.items()}, "t5", "q8_0")
    index = {}
    for i, name in enumerate(state_of("text", TEXT, "diffusers")):
        index[name] = f"model-{i % 3}.safetensors"
    for shard in set(index.values()):
        held = {name: x for name, x in state_of("text", TEXT, "diffusers").items() if index[name] == shard}
        save_file(held, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    ids = torch.arange(20)[None]
    for name in ("models_t5.pth", "fp8.safetensors", "t5.gguf", "model.safetensors.index.json"):
        given = {} if name.startswith("fp8") else {"tokenizer": tokens}
        there = TextEncoder(tmp_path / name, dtype="fp32", **given)
        mine = weights.load_component(tmp_path / name, "text", dtype="fp32").requires_grad_(False)
        assert largest(there(ids), mine(ids)) <= BAR, name
        assert there.encode(["a red circle"])[0].shape[1] == TEXT["dim"]
        small = TextEncoder(tmp_path / name, dtype="fp32", bits=8, group_size=32, **given)
        assert relative(small(ids), mine(ids)) < 0.02, name
    stored = TextEncoder(tmp_path / "fp8.safetensors")
    assert stored(ids).dtype == weights.load_component(tmp_path / "fp8.safetensors", "text")(ids).dtype


def test_a_folder_is_read_in_either_layout(tmp_path, monkeypatch):
    released = release(tmp_path / "diffusers")
    there, mine = TextEncoder(released), moddiff.load(released).text
    for a, b in zip(there.encode(PROMPTS), mine.encode(PROMPTS), strict=True):
        assert largest(a, b) <= BAR
    folder = official(tmp_path / "official")
    torch.save(state_of("text", TEXT), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    monkeypatch.setattr(releases, "preset", lambda name: preset(name) | SMALL | {"text": TEXT})
    unigram(folder / "google" / "umt5-xxl")
    there, mine = TextEncoder(folder), moddiff.load(folder).text
    assert largest(there.encode("a")[0], mine.encode("a")[0]) <= BAR


# --- what is refused --------------------------------------------------------------------------------------


def test_a_folder_without_a_text_encoder_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a Wan release: it holds nothing"):
        TextEncoder(tmp_path)
    folder = release(tmp_path / "wan")
    for path in (folder / "text_encoder").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(weights.CheckpointError, match=r"the text of .* cannot be loaded: .*holds no weights"):
        TextEncoder(folder)
    with pytest.raises(weights.CheckpointError, match="a preset holds no weights. Fetch them: hf download"):
        TextEncoder("wan2.1-t2v-1.3b")
    save_file(state_of("vae", dict(dim=8, z_dim=16, num_res_blocks=1)), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="is a vae, and was given as text="):
        TextEncoder(tmp_path / "vae.safetensors")


def test_a_weight_that_is_not_read_is_an_error(tmp_path):
    folder = release(tmp_path / "wan")
    path = folder / "text_encoder" / "model.safetensors"
    save_file(read(path) | {"layers.0.attn.lost.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    (tmp_path / "more.safetensors").replace(path)
    with pytest.raises(weights.WeightsError, match="layers.0.attn.lost.weight"):
        TextEncoder(folder)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(bits=3), "bits=3; expected 4 or 8, or None"),
        (dict(bits="4"), "bits='4'; expected 4 or 8"),
        (dict(bits=4, group_size=16), "group_size=16; expected 32, 64 or 128"),
        (dict(bits=4), "whole groups of 64, and this text encoder has dim_attn=96, dim_ffn=160; take"),
        (dict(dtype="fp64"), "dtype is torch.float64; mlx computes in float32, bfloat16 or float16"),
        (dict(dtype="int8"), "dtype is 'int8'; expected one of"),
    ],
)
def test_what_mlx_cannot_is_said_before_anything_is_made(how, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TextEncoder(ours(), **how)


def test_something_else_than_a_text_encoder_is_named(tmp_path):
    with pytest.raises(TypeError, match="where is a VAE; expected"):
        TextEncoder(moddiff.load("tiny").vae)
    there = TextEncoder(ours())
    with pytest.raises(ValueError, match="this text encoder has no tokenizer"):
        there.encode("a")
    with pytest.raises(TypeError, match="prompts must be a str or a list of str"):
        there.encode(3)
    with pytest.raises(ValueError, match="ids are .*expected"):
        there(torch.ones(2, 3))
    with pytest.raises(ValueError, match="ids run from 0 to 64; expected 0 to 63"):
        there(torch.tensor([[0, 64]]))
    there.tokenizer = unigram(tmp_path)
    assert isinstance(there.tokenizer, Tokenizer)


def test_without_mlx_the_file_is_imported_and_the_encoder_says_what_to_install():
    code = """
import sys
sys.modules["mlx"] = None  # as if it were not installed
from moddiff.remote.mlx import TextEncoder
try:
    TextEncoder("tiny")
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs mlx" in done.stdout and "pip install 'moddiff[mlx]'" in done.stdout, done.stderr


def test_its_fingerprint_tells_it_from_ours_and_from_every_other_form(tmp_path):
    text = moddiff.load("tiny").text
    made = [TextEncoder("tiny", **how) for how in ({}, {"bits": 8}, {"bits": 4}, {"dtype": "bf16"})]
    made.append(TextEncoder("tiny", bits=4, group_size=32))
    made.append(TextEncoder("tiny"))
    made[-1].tokenizer.model.add_tokens(["purple"])
    with torch.no_grad():
        text.layers[3].attn.relative_bias.weight[0, 0] += 1e-3
    made.append(TextEncoder(text))
    prints = [fingerprint(part) for part in (moddiff.load("tiny").text, *made)]
    assert len(set(prints)) == len(prints) == 8
    assert fingerprint(TextEncoder("tiny", bits=4)) == prints[3] == fingerprint(made[2])


def test_it_says_what_it_is():
    assert (
        repr(TextEncoder("tiny", bits=4)) == "mlx.TextEncoder('tiny', dtype=float32, bits=4, group_size=64)"
    )
