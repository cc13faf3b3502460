"""How does the text encoder learn to read?  A tokenizer of the world's words, and questions about captions in four languages."""

import math
import re
from collections import Counter

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn

from ..text import TextConfig, TextEncoder, Tokenizer, bucket, clean
from . import world

TEXT_CONFIG = dict(vocab=320, dim=192, dim_attn=192, dim_ffn=512, num_heads=4, num_layers=4, text_len=64)
LANGUAGE_SHARES = dict(en=0.55, es=0.15, de=0.15, zh=0.15)


def train_tokenizer(path, captions=24000, seed=7):
    """A unigram tokenizer in Wan's form (Metaspace, <pad> 0, </s> 1, <unk> 2): the words of the training captions, with their log frequencies.

    Latin words and the world's Chinese phrases are pieces of their own; every single letter is one too, far less likely, so that any other
    word can be spelled. (The EM trainer of the tokenizers library, given so few different words, cuts even "circle" to pieces.)
    """
    rng, counts = np.random.default_rng(seed), Counter()
    for i in range(captions):
        text = clean(world.caption(world.sample_scene(rng), world.LANGUAGES[i % 4], rng))
        for word in text.split(" "):
            for n, piece in enumerate(re.findall(r"[\u4e00-\u9fff]+|[^\W\u4e00-\u9fff]+|[^\w\s]", word)):
                parts = (
                    world.split_han(piece)
                    if "\u4e00" <= piece[0] <= "\u9fff"
                    else [piece if n else "\u2581" + piece]
                )
                counts.update(parts)
    total, rare = sum(counts.values()), -14.0
    pieces = [
        (piece, math.log(count / total))
        for piece, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    letters = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'-").union(*counts)
    pieces += [(letter, rare) for letter in sorted(letters - set(counts))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *pieces]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=2))
    model.add_special_tokens(["<pad>", "</s>", "<unk>"])
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.save(str(path))


def draw_language(rng):
    return str(rng.choice(list(LANGUAGE_SHARES), p=list(LANGUAGE_SHARES.values())))


class Reader(nn.Module):
    """Eight learned questions (background, how many, and each thing's shape, colour, motion) asked of the text features; thrown away later."""

    def __init__(self, dim):
        super().__init__()
        shape, colour, motion = len(world.SHAPES) + 1, len(world.COLOURS) + 1, len(world.MOTIONS) + 1
        self.answers = (len(world.BACKGROUNDS) + 1, 2, shape, colour, motion, shape, colour, motion)
        self.questions = nn.Parameter(torch.randn(len(self.answers), dim) / dim**0.5)
        self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.heads = nn.ModuleList(nn.Linear(dim, count) for count in self.answers)
        self.word_heads = nn.ModuleList(nn.Linear(dim, count) for count in (2, shape, colour, motion))

    def forward(self, features, mask):
        """features [b, l, d], mask [b, l] -> eight logits [b, answers]"""
        scores = self.questions @ self.k(features).mT * features.shape[-1] ** -0.5  # [b, 8, l]
        probs = scores.masked_fill(~mask[:, None, :], float("-inf")).softmax(-1)
        read = probs @ self.v(features)  # [b, 8, d]
        return [head(read[:, i]) for i, head in enumerate(self.heads)]


def answers(scene):
    """The class numbers a Reader should give; the class after the last name means "not said"."""

    def of(names, name):
        return len(names) if name is None else list(names).index(name)

    upper, lower = (*scene.things, None)[:2]
    thing = lambda t: [
        of(world.SHAPES, t and t.shape),
        of(world.COLOURS, t and t.colour),
        of(world.MOTIONS, t and t.motion),
    ]
    return [of(world.BACKGROUNDS, scene.background), len(scene.things) - 1, *thing(upper), *thing(lower)]


def look_around(text):
    """Start each layer's heads as listeners in one direction: near left, near right, all left, all right.

    From T5's own start, with biases near zero, the encoder stayed a bag of words for 1,500 steps: it knew the colours and the shapes of
    two things, and which belonged to which no better than by chance.
    """
    offset = torch.arange(-32, 33)
    where = bucket(offset, text.config.num_buckets, text.config.max_dist)
    for layer in text.layers:
        table = layer.attn.relative_bias.weight.data  # [buckets, heads]
        for head in range(table.shape[1]):
            side = offset < 0 if head % 2 == 0 else offset > 0
            slope = 1.0 if head % 4 < 2 else 0.15
            wanted = torch.where(side | (offset == 0), -slope * offset.abs().float(), -4.0).clamp(min=-4.0)
            for b in where.unique():
                table[b, head] = wanted[where == b].mean()


def word_answers(tokenizer, caption, scene):
    """For each token that speaks of a thing: its row, which thing (0 the upper one), and that thing's shape, colour and motion."""
    text = clean(caption)
    spans = world.mentions(text)
    offsets = tokenizer.model.encode(text, add_special_tokens=False).offsets[: tokenizer.text_len - 1]
    all_of_it = answers(scene)[2:]
    found = []
    for row, (start, end) in enumerate(offsets):
        thing = next((thing for a, b, thing in spans if start < b and end > a), None)
        if thing is not None and thing < len(scene.things):
            found.append((row, thing, *all_of_it[3 * thing : 3 * thing + 3]))
    return found


class TextStage:
    """Teach the text encoder to read before it meets the DiT, on captions of training scenes in four languages: the whole caption must answer
    eight questions, and every word about a thing must know which thing that is and what else is said of it."""

    name, embeddings, ema, muon_lr, adam_lr = (
        "text",
        ("token_embedding", "relative_bias", "questions"),
        0.995,
        0.005,
        1.5e-3,
    )

    def __init__(self, tokenizer, seed=0, batch=48):
        torch.manual_seed(seed)
        text = TextEncoder(TextConfig(**TEXT_CONFIG), Tokenizer(tokenizer, TEXT_CONFIG["text_len"]))
        look_around(text)
        self.model, self.batch = nn.ModuleDict(dict(text=text, reader=Reader(TEXT_CONFIG["dim"]))), batch

    def loss(self, step, rng):
        scenes = [world.sample_scene(rng) for _ in range(self.batch)]
        captions = [world.caption(scene, draw_language(rng), rng) for scene in scenes]
        truth = torch.tensor([answers(world.parse(caption)) for caption in captions])
        ids, mask = self.model["text"].tokenizer.batch(captions)
        features = self.model["text"](ids, mask)  # [b, l, d]
        logits = self.model["reader"](features, mask)
        loss = sum(F.cross_entropy(logit, truth[:, i]) for i, logit in enumerate(logits)) / len(logits)
        right = torch.stack([logit.argmax(-1) == truth[:, i] for i, logit in enumerate(logits)])  # [8, b]
        spoken = torch.tensor(
            [
                (i, *row)
                for i, (caption, scene) in enumerate(zip(captions, scenes))
                for row in word_answers(self.model["text"].tokenizer, caption, scene)
            ]
        )  # [words, 6]
        words = features[spoken[:, 0], spoken[:, 1]]  # [words, d]
        logits = [head(words) for head in self.model["reader"].word_heads]
        word_loss = sum(F.cross_entropy(logit, spoken[:, 2 + i]) for i, logit in enumerate(logits)) / len(
            logits
        )
        word_right = torch.stack(
            [logit.argmax(-1) == spoken[:, 2 + i] for i, logit in enumerate(logits)]
        )  # [4, words]
        return loss + word_loss, dict(
            read=float(right.float().mean()),
            read_all=float(right.all(0).float().mean()),
            which=float(word_right[0].float().mean()),
            words=float(word_right.all(0).float().mean()),
        )
