"""Does our UMT5 say what the official one and transformers' say?"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer as Model
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from moddiff.text import TextConfig, TextEncoder, Tokenizer, bucket, clean

GOLDEN = Path(__file__).parents[1] / "goldens" / "t5_encoder.safetensors"

OFFICIAL = {
    "blocks.": "layers.",
    "norm1": "norm_attn",
    "norm2": "norm_ffn",
    "attn.o.": "attn.out.",
    "pos_embedding.embedding": "attn.relative_bias",
    "ffn.gate.0": "ffn.gate",
    "ffn.fc1": "ffn.up",
    "ffn.fc2": "ffn.down",
}
OURS_TO_TRANSFORMERS = {
    "token_embedding": "shared",
    "layers.": "encoder.block.",
    "norm_attn": "layer.0.layer_norm",
    "norm_ffn": "layer.1.layer_norm",
    "attn.relative_bias": "layer.0.SelfAttention.relative_attention_bias",
    "attn.out.": "layer.0.SelfAttention.o.",
    "attn.": "layer.0.SelfAttention.",
    "ffn.gate": "layer.1.DenseReluDense.wi_0",
    "ffn.up": "layer.1.DenseReluDense.wi_1",
    "ffn.down": "layer.1.DenseReluDense.wo",
}


def renamed(name, table):
    for old, new in table.items():
        if old in name:
            name = name.replace(old, new)
            if old.startswith("attn."):
                break
    return (
        "encoder.final_layer_norm.weight" if table is OURS_TO_TRANSFORMERS and name == "norm.weight" else name
    )


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    text = TextEncoder(TextConfig(**config)).eval()
    weights = {
        renamed(n.removeprefix("weight."), OFFICIAL): t for n, t in tensors.items() if n.startswith("weight.")
    }
    text.load_state_dict(weights, strict=True)
    return text, tensors


def pair(heads=4, width=8, dim=32, ffn=48, layers=2, vocab=50, buckets=32, reach=128, seed=0):
    """Our encoder and transformers', with the same random weights, all of them far from their usual start."""
    torch.manual_seed(seed)
    ours = TextEncoder(
        TextConfig(vocab, dim, heads * width, ffn, heads, layers, num_buckets=buckets, max_dist=reach)
    ).eval()
    for name, weight in ours.named_parameters():
        weight.data.copy_(
            1 + 0.2 * torch.randn_like(weight)
            if "norm" in name
            else torch.randn_like(weight) * weight.shape[-1] ** -0.5
        )
        if "relative_bias" in name or "token" in name:
            weight.data.normal_()
    theirs = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab,
            d_model=dim,
            d_kv=width,
            d_ff=ffn,
            num_layers=layers,
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=reach,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    state = {renamed(name, OURS_TO_TRANSFORMERS): t for name, t in ours.state_dict().items()}
    theirs.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)
    return ours, theirs


@torch.no_grad()
def test_hidden_states_equal_the_official_ones_at_every_row_even_padded_ones(golden):
    text, file = golden
    hidden = text(file["in.ids"], file["in.mask"])
    assert hidden.shape == file["out.hidden"].shape
    assert (hidden - file["out.hidden"]).abs().max() <= 2e-5


@torch.no_grad()
def test_the_first_layer_and_its_bias_equal_the_official_ones(golden):
    text, file = golden
    place = torch.arange(200)
    buckets = bucket(place[None] - place[:, None])
    first = text.layers[0]
    bias = first.attn.relative_bias(buckets).permute(2, 0, 1)[None, :, 0]
    assert torch.equal(bias, file["out.rel_bias_block0_len200"])
    out = first(text.token_embedding(file["in.ids"]), buckets, file["in.mask"].bool())
    assert (out - file["mid.block0"]).abs().max() <= 2e-5


def test_every_distance_falls_into_the_official_bucket(golden):
    assert torch.equal(bucket(torch.arange(-300, 301)), golden[1]["out.bucket_of_distance"])


@torch.no_grad()
def test_real_rows_alone_equal_the_official_padded_run(golden):
    text, file = golden
    for ids, mask, hidden in zip(file["in.ids"], file["in.mask"].bool(), file["out.hidden"], strict=True):
        assert (text(ids[mask][None])[0] - hidden[mask]).abs().max() <= 2e-5


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 5),
    width=st.integers(1, 9),
    dim=st.sampled_from([8, 13, 24]),
    layers=st.integers(1, 3),
    length=st.integers(1, 150),
    buckets=st.sampled_from([8, 32, 64]),
    seed=st.integers(0, 9),
)
@torch.no_grad()
def test_hidden_states_equal_transformers(heads, width, dim, layers, length, buckets, seed):
    ours, theirs = pair(heads, width, dim, ffn=dim + 5, layers=layers, buckets=buckets, seed=seed)
    ids = torch.randint(0, 50, (2, length))
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length // 3)]])
    assert (ours(ids, mask) - theirs(ids, mask.long()).last_hidden_state).abs().max() <= 2e-5
    assert (ours(ids) - theirs(ids).last_hidden_state).abs().max() <= 2e-5


def test_gradients_equal_transformers():
    ours, theirs = pair()
    ids, mask = torch.randint(0, 50, (2, 9)), torch.arange(9)[None] < torch.tensor([[9], [4]])
    for hidden in (ours(ids, mask), theirs(ids, mask.long()).last_hidden_state):
        hidden[mask].square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(
            weight.grad, expected[renamed(name, OURS_TO_TRANSFORMERS)].grad, atol=1e-5, rtol=1e-4
        )


def half_errors(dtype, seeds=range(4)):
    """How far both half precision runs are from the float32 oracle: root mean squares, and largest."""
    ours_off, theirs_off = [], []
    for seed in seeds:
        ours, theirs = pair(layers=3, seed=seed)
        ids, mask = torch.randint(0, 50, (2, 24)), torch.arange(24)[None] < torch.tensor([[24], [10]])
        with torch.no_grad():
            truth = theirs(ids, mask.long()).last_hidden_state
            ours_off.append(ours.to(dtype)(ids, mask).float() - truth)
            theirs_off.append(theirs.to(dtype)(ids, mask.long()).last_hidden_state.float() - truth)
    return [
        (torch.cat(off).square().mean().sqrt().item(), torch.cat(off).abs().max().item())
        for off in (ours_off, theirs_off)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_transformers(dtype):
    ours, theirs = half_errors(dtype)
    print(f"\nUMT5 {dtype}: ours {ours[0]:.5f}, theirs {theirs[0]:.5f}, ratio {ours[0] / theirs[0]:.2f}")
    assert ours[0] <= theirs[0] * 1.05


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    letters = "abcdefghijklmnopqrstuvwxyz红色圆,.!"
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -3.0),
        ("▁red", -2.0),
        ("▁a", -2.5),
        *((c, -6.0) for c in letters),
    ]
    model = Model(models.Unigram(vocab, unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model.add_special_tokens(["<pad>", "</s>", "<unk>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    return path, PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60),
    length=st.integers(1, 20),
)
def test_ids_and_mask_equal_transformers_padding_to_text_len(tokenizer_file, prompt, length):
    path, theirs = tokenizer_file
    expected = theirs(
        [clean(prompt)], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ids, mask = Tokenizer(path, text_len=length).batch([prompt], length=length)
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask.long(), expected["attention_mask"])
