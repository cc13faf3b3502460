"""Does a tokenizer that comes inside the weights cut text as SentencePiece does?"""

import io
import random

import gguf
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from moddiff.text import TextEncoder, Tokenizer
from moddiff.weights import CheckpointError, build, pieces
from moddiff.weights.pieces import tokenizer_of

# What a column of a GGUF vocabulary may hold where a number or a text belongs.
ODD = [None, -1, 2.5, float("nan"), float("inf"), "", "▁", [], 2**70, "\ud800", "</s>", True]
CAPTIONS = [
    "a red circle moving left on a black background",
    "a blue square growing above a white star standing still",
    "ein roter Kreis, der sich nach links bewegt",
    "un círculo rojo que se mueve a la izquierda",
    "红色的圆形在黑色背景上向左移动",
]
PROMPTS = [
    *CAPTIONS,
    "A Red CIRCLE!",
    "ﬁne ① half-width ｶﾅ",
    "emoji 🎈 and unknown ₿",
    "",
    "x" * 50,
    "1 + 1 = 2",
]


@pytest.fixture(scope="module", params=[False, True], ids=["unknown", "bytes"])
def model(request):
    """A model as UMT5's is made: unigram, pad first, then end and unknown."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20),
        model_writer=out,
        vocab_size=440 if request.param else 150,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=request.param,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def comfy(folder, data):
    save_file(
        {"spiece_model": torch.frombuffer(bytearray(data), dtype=torch.uint8), "norm.weight": torch.ones(3)},
        folder / "x.safetensors",
    )
    return folder / "x.safetensors"


def llama(folder, data, **changed):
    """The head that llama.cpp's converter writes for such a model."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    ids = range(len(processor))
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    facts = {
        "model": "t5",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": kinds,
    } | changed
    writer = gguf.GGUFWriter(str(folder / "x.gguf"), "t5")
    for name, value in facts.items():
        add = writer.add_string if isinstance(value, str) else writer.add_array
        add(f"tokenizer.ggml.{name}", value)
    writer.add_tensor("enc.output_norm.weight", torch.ones(4).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return folder / "x.gguf"


def test_pieces_are_those_of_sentencepiece(tmp_path, model):
    ours = tokenizer_of(comfy(tmp_path, model), text_len=400)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for prompt in PROMPTS:
        assert ours.ids(prompt) == [*theirs.encode(prompt), 1], prompt
    assert ours.pad == 0 and ours.end == 1 and len(ours) == len(theirs)


def test_those_of_a_gguf_file_are_too_but_for_the_table_that_it_may_lack(tmp_path, model):
    ours = tokenizer_of(llama(tmp_path, model), text_len=400)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for prompt in CAPTIONS:
        assert ours.ids(prompt) == [*theirs.encode(prompt), 1], prompt


def test_an_encoder_takes_it(tmp_path, model):
    text = TextEncoder(build("text", dict(vocab=500, dim=8, dim_attn=8, dim_ffn=8, num_heads=2,
                                          num_layers=1)).config)  # fmt: skip
    text.tokenizer = tokenizer_of(comfy(tmp_path, model))
    assert text.encode("a red circle")[0].shape == (len(text.tokens("a red circle")), 8)


def test_a_file_without_one_has_none(tmp_path):
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "x.safetensors")
    assert tokenizer_of(tmp_path / "x.safetensors") is None


@pytest.mark.parametrize("data", [b"\1\2\3", b"\x0a\x7fshort", b"\xff" * 20, b"\x0a\x02\x08\x01", b"\x0f"])
def test_what_is_no_model_is_said(tmp_path, data):
    with pytest.raises(CheckpointError, match="spiece_model that is no file of SentencePiece"):
        tokenizer_of(comfy(tmp_path, data))


def test_half_a_tokenizer_is_said(tmp_path, model):
    for changed in ({"model": "llama"}, {"scores": [0.0]}, {"tokens": ["<pad>", "</s>"]}):
        with pytest.raises(CheckpointError, match="or half of one; expected 't5'"):
            tokenizer_of(llama(tmp_path, model, **changed))
    with pytest.raises(CheckpointError, match="tokenizer that is damaged"):
        tokenizer_of(llama(tmp_path, model, precompiled_charsmap=[1, 2, 3]))


def test_a_table_whose_tree_leads_astray_is_told_before_a_prompt_meets_it(tmp_path, model):
    found = pieces._from_bytes("x", model)
    size = int.from_bytes(found.table[:4], "little")
    assert size and pieces.is_table(found.table)
    rng, refused = random.Random(0), 0
    for _ in range(25):
        table = bytearray(found.table)
        for _ in range(20):  # in the first nodes, which every prompt passes
            table[4 + rng.randrange(1024)] = rng.randrange(256)
        if not pieces.is_table(bytes(table)):
            refused += 1
            continue
        tokenizer = Tokenizer("x", 32, pieces._built("x", pieces.Pieces(found.pieces, bytes(table))))
        for text in PROMPTS:
            tokenizer.ids(text)  # would panic
    assert 5 < refused


@pytest.mark.parametrize("seed", range(4))
def test_damaged_tokenizers_are_a_clear_error_or_read(tmp_path, model, seed):
    """Fifty vocabularies in the two formats; the tables, which are most of the bytes, have a test above."""
    rng = random.Random(seed)
    head = model.index(b"nmt_nfkc")
    end, small = min(head, 1400), pieces.Pieces(pieces._from_bytes("x", model).pieces, b"")
    for _ in range(25):
        data = bytearray(model)
        for _ in range(rng.choice((1, 1, 4))):
            at, size = rng.randrange(end), rng.randrange(9)
            data[at : at + size] = rng.choice((b"", b"\xff" * size, bytes(size), rng.randbytes(size)))
        columns = [list(column) for column in zip(*small.pieces)]
        column = rng.choice(columns)
        column[rng.randrange(len(column))] = rng.choice(ODD)
        said = dict(zip(("tokens", "scores", "token_type"), columns)) | {"model": "t5"}
        if rng.random() < 0.5:
            said["precompiled_charsmap"] = [rng.choice(ODD)]
        facts = {f"tokenizer.ggml.{name}": value for name, value in said.items()}
        for made in (
            lambda data=data: pieces._from_bytes("x", bytes(data)),
            lambda facts=facts: pieces._from_facts("x", facts),
        ):
            try:
                tokenizer = Tokenizer("x", 32, pieces._built("x", made()))
            except ValueError as error:  # which CheckpointError is
                assert "fetch it again" in str(error).lower() or "UMT5" in str(error) or "umt5" in str(error)
                continue
            for text in PROMPTS:
                assert all(0 <= i < tokenizer.model.get_vocab_size() for i in tokenizer.ids(text))
