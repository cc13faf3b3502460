"""Which tokenizer is packed into this file of weights?  GGUF and ComfyUI's text encoders bring their own.

Both hold what SentencePiece made: pieces of text with a score and a type each, and a table that normalises
text. GGUF has them as facts of its head, ComfyUI as SentencePiece's own file, byte for byte, in a tensor that
is called spiece_model. Source: sentencepiece_model.proto; docs/gguf.md.
"""

import base64
import json
import struct
from dataclasses import dataclass

import torch

from ..text import Tokenizer
from . import files, gguf
from .formats import CheckpointError

SPIECE = "spiece_model"
# What a piece can be, in both.
UNKNOWN, CONTROL, BY_USER, BYTE = 2, 3, 4, 6


@dataclass(frozen=True)
class Pieces:
    """What SentencePiece made of a language: (text, score, type) for each id, and the normaliser's table."""

    pieces: list
    table: bytes


def tokenizer_of(where, text_len=512):
    """The tokenizer in a file of weights, ready to use.   -> Tokenizer, or None where there is none

    Raises CheckpointError for one that cannot be understood.
    """
    first = files.files(where)[0]
    if gguf.is_gguf(first):
        found = _from_facts(first, gguf.facts(first))
    else:
        packed = next((x for name, x in files.read(where).items() if name.endswith(SPIECE)), None)
        found = None if packed is None else _from_bytes(first, bytes(packed.tolist()))
    return None if found is None else Tokenizer(first, text_len, _built(first, found))


def _from_facts(path, facts):
    """From the head of a GGUF file."""
    said = {name.removeprefix("tokenizer.ggml."): value for name, value in facts.items()}
    if "tokens" not in said:
        return None
    columns = [said.get(name) for name in ("tokens", "scores", "token_type")]
    whole = all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
    table = said.get("precompiled_charsmap") or []
    numbers = isinstance(table, list) and all(isinstance(value, int) for value in table)
    if said.get("model") != "t5" or not whole or not numbers:
        raise CheckpointError(
            f"{path} has a tokenizer of kind {said.get('model')!r}, or half of one; expected 't5' with as "
            "many scores and types as tokens. Give one beside it: tokenizer=, the folder of google/umt5-xxl"
        )
    return Pieces(list(zip(*columns)), bytes(value & 255 for value in table))


def _from_bytes(path, data):
    """From SentencePiece's own file: field 1 is a piece, field 3 the normaliser, whose field 2 its table."""
    pieces, table = [], b""
    try:
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((piece[1].decode(), score, piece.get(3, 1)))
            elif field == 3:
                table = dict(_fields(value)).get(2, b"")
    except (LookupError, UnicodeDecodeError, struct.error, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} has a {SPIECE} that is no file of SentencePiece ({error!r}); fetch it again"
        ) from error
    return Pieces(pieces, table)


def _fields(data):
    """The (number, value) pairs of a protocol buffer message: whole numbers, or the bytes of all else."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        match key & 7:
            case 0:
                value, at = _number(data, at)
            case 1 | 5 as wire:
                size = 8 if wire == 1 else 4
                value, at = data[at : at + size], at + size
            case 2:
                size, at = _number(data, at)
                value, at = data[at : at + size], at + size
            case other:
                raise LookupError(f"wire type {other}")
        if at > len(data):
            raise LookupError("it ends within a field")
        yield key >> 3, value


def _number(data, at):
    """A whole number, seven bits a byte, the least first.   -> (it, where it ends)"""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise LookupError("a number without end")


def _built(path, found):
    """As transformers turns such a model into a tokenizer.json.   -> tokenizers.Tokenizer"""
    if found.table and not is_table(found.table):
        raise CheckpointError(f"{path} has a tokenizer that is damaged: its table of letters. Fetch it again")
    kinds = [kind for _, _, kind in found.pieces]
    if UNKNOWN not in kinds:
        raise CheckpointError(
            f"{path} has a tokenizer that is damaged: none of its {len(kinds):,} pieces stands for what is "
            "unknown. Fetch it again"
        )
    special = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": kind == BY_USER,
            "special": kind != BY_USER,
        }
        for i, (text, _, kind) in enumerate(found.pieces)
        if kind in (UNKNOWN, CONTROL, BY_USER)
    ]
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(found.table).decode()}
    # T5 cuts off what is blank at the end, and takes several blanks for one.
    tidy = [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ]
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    whole = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [table, *tidy] if found.table else tidy},
        "pre_tokenizer": words,
        "decoder": words,
        "model": {
            "type": "Unigram",
            "unk_id": kinds.index(UNKNOWN),
            "vocab": [[text, score] for text, score, _ in found.pieces],
            "byte_fallback": BYTE in kinds,
        },
    }
    import tokenizers  # late, as in text.py

    try:
        return tokenizers.Tokenizer.from_buffer(json.dumps(whole).encode())
    except ValueError as error:
        raise CheckpointError(f"{path} has a tokenizer that is damaged: {error}. Fetch it again") from error


def is_table(table):
    """Is this a normaliser's table, whole?  The library panics in the middle of a prompt where it is not.

    The size of a search tree in bytes, the tree, and the texts that its leaves point to. The tree is a double
    array (darts-clone): a word of 32 bits a node, whose children lie at its base ^ their letter, in blocks of
    256. Every node that a text can lead to is looked at.
    """
    size = int.from_bytes(table[:4], "little")
    tree, texts = table[4 : 4 + size], table[4 + size :]
    if not texts or not size or size % (4 * 256):
        return False
    try:
        texts.decode()
    except UnicodeDecodeError:
        return False
    nodes = torch.frombuffer(bytearray(tree), dtype=torch.int32).long() & 0xFFFFFFFF
    # A text begins where a letter does, not within one.
    begins = torch.frombuffer(bytearray(texts), dtype=torch.uint8) & 0xC0 != 0x80
    letters = torch.arange(1, 256)
    seen = torch.zeros(len(nodes), dtype=torch.bool)
    bases = _base(nodes[:1])
    while len(bases):
        if bases.max() >= len(nodes):
            return False
        bases = bases[~seen[bases]].unique()
        seen[bases] = True
        there = bases[:, None] ^ letters
        found = nodes[there] & 0x800000FF == letters  # a node carries the letter that leads to it
        children = nodes[there[found]]
        bases = there[found] ^ _base(children)
        leaves = bases[(children & 0x100) > 0]
        if len(leaves) and leaves.max() < len(nodes):
            points = nodes[leaves] & 0x7FFFFFFF
            if points.max() >= len(texts) or not begins[points].all():
                return False
    return True


def _base(nodes):
    """How far from a node its children lie: 22 bits, and one that says whether in steps of 256."""
    return (nodes >> 10) << ((nodes & 0x200) >> 6)
