"""How do the encoders learn what words and frames mean?  A tokenizer, a quiz about captions, matching."""

import math
import re
from collections import Counter

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn

from ..image import ImageConfig, ImageEncoder
from ..text import TextConfig, TextEncoder, Tokenizer, bucket, clean
from ..video import to_tensor
from . import world
from .muon import Recipe
from .training_set import draw_language

TEXT_CONFIG = dict(vocab=320, dim=192, dim_attn=192, dim_ffn=512, num_heads=4, num_layers=4, text_len=64)
IMAGE_CONFIG = dict(image_size=64, patch_size=8, dim=128, mlp_ratio=4, out_dim=64, num_heads=4, num_layers=4)
# The text tower is thrown away, so it is small.
TOWER_CONFIG = {**TEXT_CONFIG, "dim": 64, "dim_attn": 64, "dim_ffn": 128, "num_layers": 2}


def new_text_encoder(tokenizer, config=TEXT_CONFIG):
    """A text encoder that has learnt nothing yet.   tokenizer: path of its tokenizer.json"""
    return TextEncoder(TextConfig(**config), Tokenizer(tokenizer, config["text_len"]))


def train_tokenizer(captions=24000, seed=7):
    """A unigram tokenizer in Wan's form (Metaspace, <pad> 0, </s> 1, <unk> 2): the text of a tokenizer.json.

    Its pieces are the words of the training captions, with their log frequencies: Latin words, the world's
    Chinese phrases, and every single letter, far less likely, so that any other word can be spelled. (The EM
    trainer of the tokenizers library, given so few different words, cuts even "circle" to pieces.)
    """
    rng, counts = np.random.default_rng(seed), Counter()
    for i in range(captions):
        text = clean(world.caption(world.sample_scene(rng), world.LANGUAGES[i % 4], rng))
        for word in text.split(" "):
            for n, run in enumerate(re.findall(r"[\u4e00-\u9fff]+|[^\W\u4e00-\u9fff]+|[^\w\s]", word)):
                han = "\u4e00" <= run[0] <= "\u9fff"
                counts.update(world.split_han(run) if han else [run if n else "\u2581" + run])
    total = counts.total()
    by_frequency = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    letters = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'-").union(*counts)
    vocab = [
        *[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)],
        *[(piece, math.log(count / total)) for piece, count in by_frequency],
        *[(letter, -14.0) for letter in sorted(letters - set(counts))],
    ]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=2))
    model.add_special_tokens(["<pad>", "</s>", "<unk>"])
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    return model.to_str(pretty=True)


class Quiz(nn.Module):
    """Eight learned questions asked of the text features; thrown away after this stage.

    They are background, how many, and each thing's shape, colour and motion.
    """

    def __init__(self, dim):
        super().__init__()
        shape, colour, motion = len(world.SHAPES) + 1, len(world.COLOURS) + 1, len(world.MOTIONS) + 1
        counts = (len(world.BACKGROUNDS) + 1, 2, shape, colour, motion, shape, colour, motion)
        self.questions = nn.Parameter(torch.randn(len(counts), dim) / dim**0.5)
        self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.heads = nn.ModuleList(nn.Linear(dim, count) for count in counts)
        self.word_heads = nn.ModuleList(nn.Linear(dim, count) for count in (2, shape, colour, motion))

    def forward(self, features, mask):
        """features [b, l, d], mask [b, l] -> eight logits [b, answers]"""
        scores = self.questions @ self.k(features).mT * features.shape[-1] ** -0.5  # [b, 8, l]
        probs = scores.masked_fill(~mask[:, None, :], float("-inf")).softmax(-1)
        heard = probs @ self.v(features)  # [b, 8, d]
        return [head(heard[:, i]) for i, head in enumerate(self.heads)]


def class_of(names, name):
    """The number of a name; the one after the last means "not said"."""
    return len(names) if name is None else list(names).index(name)


def answers(scene):
    """The eight class numbers that a Quiz should give."""
    numbers = [class_of(world.BACKGROUNDS, scene.background), len(scene.things) - 1]
    for thing in (*scene.things, None)[:2]:
        names = (thing.shape, thing.colour, thing.motion) if thing else (None, None, None)
        numbers += map(class_of, (world.SHAPES, world.COLOURS, world.MOTIONS), names)
    return numbers


def word_answers(tokenizer, caption, scene):
    """For each token about a thing: its row, which thing (0 the upper one), its shape, colour and motion."""
    text = clean(caption)
    spans = world.mentions(text)
    offsets = tokenizer.model.encode(text, add_special_tokens=False).offsets[: tokenizer.text_len - 1]
    of_things = answers(scene)[2:]
    return [
        (row, thing, *of_things[3 * thing : 3 * thing + 3])
        for row, (start, end) in enumerate(offsets)
        for first, last, thing in spans
        if start < last and end > first
    ]


def look_around(text):
    """Start each layer's heads as listeners in one direction: near left, near right, all left, all right.

    From T5's own start, with biases near zero, the encoder stayed a bag of words for 1,500 steps: it knew the
    colours and the shapes of two things, and which belonged to which no better than by chance.
    """
    offset = torch.arange(-32, 33)
    buckets = bucket(offset, text.config.num_buckets, text.config.max_dist)
    for layer in text.layers:
        table = layer.attn.relative_bias.weight.data  # [buckets, heads]
        for head in range(table.shape[1]):
            side = offset <= 0 if head % 2 == 0 else offset >= 0
            slope = 1.0 if head % 4 < 2 else 0.15
            bias = torch.where(side, -slope * offset.abs().float(), -4.0).clamp(min=-4.0)
            for b in buckets.unique():
                table[b, head] = bias[buckets == b].mean()


class TextStage:
    """Teach the text encoder before it meets the DiT, on captions of training scenes in four languages.

    The whole caption must answer the quiz, and every word about a thing must know which thing that is and
    what else is said of it.
    """

    name = "text"
    recipe = Recipe(
        muon=0.005, adam=1.5e-3, ema=0.995, embeddings=("token_embedding", "relative_bias", "questions")
    )

    def __init__(self, tokenizer, seed=0, batch=48):
        torch.manual_seed(seed)
        text = new_text_encoder(tokenizer)
        look_around(text)
        self.model, self.batch = nn.ModuleDict(dict(text=text, quiz=Quiz(TEXT_CONFIG["dim"]))), batch

    def draw(self, step, rng):
        """Captions, what the quiz should hear in each [b, 8], and [words, 6] of every word about a thing."""
        tokenizer = self.model["text"].tokenizer
        scenes = [world.sample_scene(rng) for _ in range(self.batch)]
        captions = [world.caption(scene, draw_language(rng), rng) for scene in scenes]
        ids, mask = tokenizer.batch(captions)
        truth = torch.tensor([answers(world.parse(caption)) for caption in captions])
        spoken = [
            (i, *row)
            for i, (caption, scene) in enumerate(zip(captions, scenes))
            for row in word_answers(tokenizer, caption, scene)
        ]
        return dict(ids=ids, mask=mask, truth=truth, spoken=torch.tensor(spoken))

    def loss(self, ids, mask, truth, spoken):
        quiz, features = self.model["quiz"], self.model["text"](ids, mask)  # [b, l, d]
        loss, right = graded(quiz(features, mask), truth)
        sample, row, *word_truth = spoken.T
        words = features[sample, row]  # [words, d]
        word_loss, word_right = graded([head(words) for head in quiz.word_heads], torch.stack(word_truth, 1))
        return loss + word_loss, dict(
            answered=right.float().mean(),
            all_answered=right.all(1).float().mean(),
            which=word_right[:, 0].float().mean(),
            words=word_right.all(1).float().mean(),
        )


def graded(logits, truth):
    """Mean cross-entropy of several questions, and which answers were right.

    logits  a list of [b, classes];  truth [b, questions]   ->  loss, [b, questions]
    """
    losses = [F.cross_entropy(logit, truth[:, i]) for i, logit in enumerate(logits)]
    right = torch.stack([logit.argmax(-1) == truth[:, i] for i, logit in enumerate(logits)], 1)
    return sum(losses) / len(losses), right


def still_caption(scene):
    """What one frame shows: shapes, colours, background; no motion."""
    things = " above ".join(f"a {thing.colour} {thing.shape}" for thing in scene.things)
    return f"{things} on a {scene.background} background"


class CLIPStage:
    """Match frames with sentences about them; pairs that share a sentence count as right."""

    name = "clip"
    recipe = Recipe(
        muon=0.005,
        adam=1.5e-3,
        ema=0.995,
        embeddings=("token_embedding", "relative_bias", "position_embedding", "class_token"),
    )

    def __init__(self, tokenizer, seed=0, batch=48):
        torch.manual_seed(seed)
        image, text = ImageEncoder(ImageConfig(**IMAGE_CONFIG)), new_text_encoder(tokenizer, TOWER_CONFIG)
        self.model, self.batch = nn.ModuleDict(dict(image=image, text=text)), batch
        self.model.register_parameter("log_scale", nn.Parameter(torch.tensor(math.log(10.0))))

    def draw(self, step, rng):
        """Frames [b, 3, H, W], captions, and same [b, b]: 1 where two of them say the same."""
        scenes = [world.sample_scene(rng) for _ in range(self.batch)]
        clips = (world.clip(scene, int(rng.integers(2**31)), frames=3) for scene in scenes)
        frames = to_tensor([clip[int(rng.integers(3))][None] for clip in clips])[:, :, 0]
        captions = [still_caption(scene) for scene in scenes]
        ids, mask = self.model["text"].tokenizer.batch(captions)
        same = torch.tensor([[float(a == b) for b in captions] for a in captions])
        return dict(frames=frames, ids=ids, mask=mask, same=same)

    def loss(self, frames, ids, mask, same):
        words = self.model["text"](ids, mask)
        text = F.normalize((words * mask[..., None]).sum(1), dim=-1)  # [b, d]
        image = F.normalize(self.model["image"].project(frames), dim=-1)  # [b, d]
        logits = self.model.log_scale.exp().clamp(max=100) * image @ text.T  # [b, b]
        target = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)  # words, then frames
        return loss, dict(matched=same.gather(1, logits.argmax(1, keepdim=True)).mean())
