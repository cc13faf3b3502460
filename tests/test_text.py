"""Does text.py hear exactly the prompt: every word, no padding, nobody else's?"""

import copy

import accelerate
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moddiff.attention import math_kernel, use_kernel
from moddiff.hooks import capture, patch
from moddiff.text import RMSNorm, TextConfig, TextEncoder, Tokenizer, bucket, clean, fit_half

WORDS = [
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "moving",
    "left",
    "right",
    "on",
    "black",
    "background",
    "un",
    "círculo",
    "红色",
    "圆",
]


def unigram(path, pieces=("<pad>", "</s>", "<unk>"), **settings):
    """A small Unigram tokenizer in the form of google/umt5-xxl's, saved as tokenizer.json."""
    letters = sorted({letter for word in WORDS for letter in word})
    vocab = (
        [(p, 0.0) for p in pieces]
        + [("▁", -3.0)]
        + [("▁" + w, -2.0) for w in WORDS]
        + [(c, -6.0) for c in letters]
    )
    model = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=2))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    model.add_special_tokens(list(pieces))
    if "</s>" in pieces:
        model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def folder(tmp_path):
    return unigram(tmp_path)


def encoder(tokenizer=None, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab=64, dim=24, dim_attn=32, dim_ffn=40, num_heads=4, num_layers=2, text_len=16)
    return TextEncoder(TextConfig(**{**sizes, **changes}), tokenizer).eval()


# --- cleaning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dirty, expected",
    [
        ("  a  red\n\tcircle ", "a red circle"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&lt;b&gt; bold", "<b> bold"),
        ("a < b &amp;amp; c", "a < b & c"),
        ("schÃ¶n", "schön"),
        ("“quoted” ﬁne", '"quoted" fine'),
        ("A Red CIRCLE", "A Red CIRCLE"),
        ("红色　圆", "红色 圆"),
        ("", ""),
    ],
)
def test_cleaning_repairs_text_and_keeps_its_case(dirty, expected):
    assert clean(dirty) == expected


# --- tokens -----------------------------------------------------------------------------------------------


def test_a_prompt_becomes_its_pieces_and_one_end_token(folder):
    tokenizer = Tokenizer(folder, text_len=16)
    assert [piece for _, piece in tokenizer.tokens("a  red circle")] == ["▁a", "▁red", "▁circle", "</s>"]
    assert [i for i, _ in tokenizer.tokens("a red circle")] == tokenizer.ids("a red circle")
    assert tokenizer.ids("")[-1:] == [1] == tokenizer.ids("")


def test_a_long_prompt_loses_its_tail_but_never_its_end_token(folder):
    ids = Tokenizer(folder, text_len=8).ids("red " * 50)
    assert len(ids) == 8 and ids[-1] == 1 and len(set(ids[:-1])) == 1


def test_the_tokenizer_reads_a_folder_or_the_file_and_says_what_it_is(folder):
    assert Tokenizer(folder).ids("a red circle") == Tokenizer(folder / "tokenizer.json").ids("a red circle")
    assert "tokenizer.json" in repr(Tokenizer(folder)) and "text_len=512" in repr(Tokenizer(folder))


def test_padding_and_truncation_stored_in_the_file_are_ignored(folder):
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = Tokenizer(folder).ids("a red circle moving left")
    model.enable_padding(length=40)
    model.enable_truncation(3)
    model.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder).ids("a red circle moving left") == expected


def test_a_batch_is_padded_to_its_longest_prompt_or_to_the_length_asked(folder):
    tokenizer = Tokenizer(folder, text_len=16)
    ids, mask = tokenizer.batch(["a red circle", "a"])
    assert (
        ids.shape == mask.shape == (2, 4) and mask.sum(1).tolist() == [4, 2] and ids[1, 2:].tolist() == [0, 0]
    )
    assert tokenizer.batch(["a"], length=9)[0].shape == (1, 9)
    assert tokenizer.batch([])[0].shape == (0, 0)
    assert torch.equal(tokenizer.batch("a red circle")[0], tokenizer.batch(["a red circle"])[0])
    with pytest.raises(ValueError, match="4 tokens, which do not fit in length=3"):
        tokenizer.batch(["a red circle"], length=3)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json.*google/umt5-xxl"):
        Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*nowhere"):
        Tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"model": {"type": "Unigr',
        b"version https://git-lfs.github.com/spec/v1",
        b'{"model": {}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json .*download cut off"):
        Tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no end token </s>"):
        Tokenizer(unigram(tmp_path, pieces=("<pad>", "<eos>", "<unk>")))


def test_a_text_length_of_zero_is_refused(folder):
    with pytest.raises(ValueError, match="text_len is 0; expected 1 or more"):
        Tokenizer(folder, text_len=0)


# --- the pieces of the encoder ----------------------------------------------------------------------------


def test_near_distances_have_their_own_bucket_and_far_ones_share():
    spans = {
        8: (8, 11),
        9: (12, 15),
        10: (16, 22),
        11: (23, 31),
        12: (32, 45),
        13: (46, 63),
        14: (64, 90),
        15: (91, 600),
    }
    expected = {n: n for n in range(8)} | {
        n: b for b, (low, high) in spans.items() for n in range(low, high + 1)
    }
    distance = torch.arange(1, 601)
    assert bucket(-distance).tolist() == [expected[n] for n in range(1, 601)]
    assert bucket(distance).tolist() == [16 + expected[n] for n in range(1, 601)]
    assert bucket(torch.tensor(0)) == 0


def test_the_norm_leaves_a_root_mean_square_of_one():
    x = RMSNorm(50, 1e-6)(torch.randn(3, 50) * 40)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(3), atol=1e-4, rtol=0)


def test_only_an_overflow_in_half_precision_is_clamped():
    big = torch.tensor([65000.0, 1.0, float("-inf")])
    assert fit_half(big.half()).tolist() == [64512.0, 1.0, -64512.0]
    assert fit_half(big[:2].half()).tolist() == [64992.0, 1.0]
    assert fit_half(big).tolist() == big.tolist() and fit_half(big.bfloat16())[2] == float("-inf")


def test_a_stream_that_overflows_half_precision_stays_finite():
    text = encoder().half()
    for layer in text.layers:
        layer.ffn.down.weight.data.fill_(3e4)
    assert text(torch.arange(6)[None]).isfinite().all()


# --- the encoder ------------------------------------------------------------------------------------------


def test_encode_gives_one_row_per_real_token(folder):
    text = encoder(folder)
    prompts = ["a red circle", "un círculo", "红色", ""]
    rows = text.encode(prompts)
    assert [list(row.shape) for row in rows] == [[len(text.tokens(p)), 24] for p in prompts]
    assert not any(row.requires_grad for row in rows)
    assert torch.equal(text.encode("a red circle")[0], rows[0]) and text.encode([]) == []


def test_encode_agrees_with_a_padded_and_masked_batch(folder):
    text = encoder(folder)
    prompts = ["a red circle moving left", "a", "un círculo 圆"]
    ids, mask = text.tokenizer.batch(prompts, length=16)
    hidden = text(ids, mask)
    for row, wide, real in zip(text.encode(prompts), hidden, mask, strict=True):
        torch.testing.assert_close(row, wide[real], atol=2e-6, rtol=0)


def test_company_in_the_list_changes_no_bit(folder):
    text = encoder(folder)
    together = text.encode(["a red circle", "a blue square moving right on black background"])
    assert torch.equal(together[0], text.encode(["a red circle"])[0])


def test_what_stands_in_the_padding_changes_no_bit_of_the_real_rows():
    text = encoder()
    ids, mask = torch.randint(0, 64, (2, 12)), torch.arange(12)[None] < torch.tensor([[5], [9]])
    other = torch.where(mask, ids, torch.randint(0, 64, (2, 12)))
    assert torch.equal(text(ids, mask)[mask], text(other, mask)[mask])


def test_batch_mates_change_nothing():
    text = encoder()
    ids = torch.randint(0, 64, (3, 7))
    torch.testing.assert_close(text(ids)[1:2], text(ids[1:2]), atol=2e-6, rtol=0)


def test_a_row_that_is_all_padding_stays_finite():
    assert encoder()(torch.zeros(1, 4).long(), torch.zeros(1, 4)).isfinite().all()


def test_every_layer_is_called_as_a_module(folder):
    text = encoder(folder)
    layers = {name for name, module in text.named_modules() if module._parameters}
    fired = []
    for name in layers:
        text.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    text.encode(["a red circle"])
    assert sorted(fired) == sorted(layers)


def test_weights_that_an_offloader_brings_layer_by_layer_give_the_same_bits(folder):
    text = encoder(folder)
    moved = accelerate.cpu_offload(copy.deepcopy(text), execution_device=torch.device("cpu"))
    assert moved.token_embedding.weight.is_meta
    assert torch.equal(moved.encode(["a red circle"])[0], text.encode(["a red circle"])[0])


def test_under_autocast_the_stream_and_its_norms_stay_float32(folder):
    text = encoder(folder)
    plain = text.encode(["a red circle"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), capture(text, "layers.*.resid_post") as seen:
        cast = text.encode(["a red circle"])[0]
    assert {value.dtype for _, value in seen} == {cast.dtype} == {torch.float32}
    assert (cast - plain).abs().max() < 0.02 * plain.abs().max()
    last = seen["layers.1.resid_post"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(text.norm(last)[0], cast)
    assert torch.equal(text.norm(last)[0], cast)


def test_dim_is_the_width_of_what_encode_gives(folder):
    text = encoder(folder)
    assert text.encode(["a"])[0].shape[1] == text.dim


def test_word_order_is_heard():
    ids = torch.tensor([[5, 9, 7]])
    text = encoder()
    assert not torch.allclose(text(ids).flip(1), text(ids.flip(1)), atol=1e-3)


def test_training_reaches_every_weight():
    text = encoder()
    text(torch.randint(0, 64, (2, 12)), torch.ones(2, 12)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in text.named_parameters()
        if "token" not in name
    )
    assert text.token_embedding.weight.grad.abs().sum() > 0


def test_bad_prompts_are_named(folder):
    text = encoder(folder)
    with pytest.raises(TypeError, match="a prompt must be a str, but this one is int: 3"):
        text.encode(["a", 3])
    with pytest.raises(TypeError, match="prompts must be a str or a list of str, but arrived as dict"):
        text.encode({"prompt": "a"})
    with pytest.raises(TypeError, match="arrived as Tensor") as error:
        text.encode(torch.zeros(100, 100))
    assert len(str(error.value)) < 150
    with pytest.raises(TypeError, match="this one is bytes") as error:
        text.encode([b"a" * 10_000])
    assert len(str(error.value)) < 150


@pytest.mark.parametrize("prompt", ["a \udcff circle", "\ud83d\ude00"])
def test_a_prompt_that_was_read_in_a_wrong_encoding_is_refused(folder, prompt):
    with pytest.raises(
        ValueError, match=r"'.u[\w]{4}' at place \d, half a letter; .*not UTF-8: read it again"
    ):
        encoder(folder).encode([prompt])


def test_the_counts_of_a_prompt_say_how_much_of_it_is_read(folder):
    assert encoder(folder).counts("a red circle") == (3, 3)
    assert encoder(folder).counts("red " * 50) == (15, 50)


def test_an_encoder_without_a_tokenizer_says_how_to_give_it_one(folder):
    text = encoder()
    with pytest.raises(ValueError, match="no tokenizer; give it one: text.tokenizer = Tokenizer"):
        text.encode("a")
    text.tokenizer = Tokenizer(folder, text_len=16)
    assert len(text.encode("a")) == 1


def test_a_tokenizer_that_does_not_fit_the_encoder_is_refused(folder):
    with pytest.raises(
        ValueError, match="has vectors for 20; take the tokenizer that came with these weights"
    ):
        encoder(folder, vocab=20)
    with pytest.raises(ValueError, match="text_len=512 tokens but the config says 16"):
        encoder(Tokenizer(folder))


@pytest.mark.parametrize(
    "ids, mask, message",
    [
        (torch.zeros(3).long(), None, r"ids are \[3\] of torch.int64; expected \[b, l\] integers"),
        (torch.zeros(1, 3), None, r"ids are \[1, 3\] of torch.float32"),
        (["a red circle"], None, r"ids are list; .*for prompts as they are: encode\(prompts\)"),
        (torch.zeros(1, 3).long(), torch.ones(1, 4), r"mask is \[1, 4\] but ids are \[1, 3\]"),
        (torch.tensor([[0, 64]]), None, "ids run from 0 to 64; expected 0 to 63: was another tokenizer used"),
        (torch.tensor([[-1, 3]]), None, "ids run from -1 to 3"),
    ],
)
def test_bad_ids_are_named(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        encoder()(ids, mask)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=5), "dim_attn=32 cannot be split into num_heads=5"),
        (dict(shared_pos=True), "shared_pos=True is T5"),
        (dict(num_buckets=30), "num_buckets=30, max_dist=128: expected a multiple of 4"),
        (dict(max_dist=8), "num_buckets=32, max_dist=8"),
    ],
)
def test_a_config_that_contradicts_itself_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        encoder(**change)


def test_the_weights_have_the_agreed_names():
    names = set(encoder(num_layers=1).state_dict())
    inside = [
        "norm_attn",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.out",
        "attn.relative_bias",
        "norm_ffn",
        "ffn.gate",
        "ffn.up",
        "ffn.down",
    ]
    assert names == {"token_embedding.weight", "norm.weight"} | {f"layers.0.{part}.weight" for part in inside}


def test_every_part_shows_its_agreed_taps():
    text = encoder()
    for layer in text.layers:
        assert {"resid_pre", "resid_mid", "resid_post"} <= set(layer.tap.layouts)
        assert {"q", "k", "v", "bias", "scores", "probs", "heads", "out", "attend"} <= set(
            layer.attn.tap.layouts
        )


@torch.no_grad()
def test_looking_inside_shows_the_softmax_and_changes_no_bit():
    text, ids, mask = (
        encoder(),
        torch.randint(0, 64, (2, 6)),
        torch.arange(6)[None] < torch.tensor([[6], [4]]),
    )
    plain = text(ids, mask)
    with capture(text, "layers.*") as seen:
        looked = text(ids, mask)
    assert torch.equal(plain, looked)
    q, k, v, bias, probs, heads = (
        seen[f"layers.1.attn.{name}"] for name in ["q", "k", "v", "bias", "probs", "heads"]
    )
    expected = (q @ k.mT + bias).masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(heads, expected @ v)
    assert bias.shape == (1, 4, 6, 6) and torch.equal(text.norm(seen["layers.1.resid_post"]), plain)


@torch.no_grad()
def test_a_patched_bias_is_obeyed_but_cannot_uncover_the_padding():
    text, ids, mask = encoder(num_layers=1), torch.randint(0, 64, (1, 5)), torch.tensor([[1, 1, 1, 0, 0]])
    flat = copy.deepcopy(text)
    flat.layers[0].attn.relative_bias.weight.zero_()
    with patch(text, "layers.0.attn.bias", lambda bias, where: bias * 0):
        assert torch.equal(text(ids, mask), flat(ids, mask))


def test_one_call_puts_every_attention_on_another_kernel(folder):
    text, calls = encoder(folder), []
    plain = text.encode(["a red circle"])[0]

    def kernel(q, k, v, bias, scale):
        calls.append((q.shape, scale))
        return math_kernel(q, k, v, bias, scale)

    again = use_kernel(text, kernel).encode(["a red circle"])[0]
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=0)
    assert calls == [((1, 4, 4, 8), 1.0)] * 2
