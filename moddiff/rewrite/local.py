"""How is a language model asked in this process?  Through transformers, or mlx-lm on a Mac.

Here its next-token scores are at hand, so a small model can be held to a grammar: at each token only those
are left that begin a caption of the tiny world.
"""

import json
from pathlib import Path

from .answers import Rewriter
from .form import Reader

TOKENS = 400  # of an answer


class Transformers(Rewriter):
    """A language model in a folder (or one .gguf file), run by transformers.

    folder   with config.json, weights, tokenizer; or a .gguf file that transformers can read
    device, dtype    of the weights
    free     True: not even the tiny world's instructions hold it to their sentences
    scale    above 1: guidance. What the wish changes in the scores, against an empty wish, counts that many
             times, so that a small model's favourite words do not win (Sanchez et al. 2023, arXiv 2306.17806)
    form     True: the instructions' form, one question for each word, where they have one (see form.py): for
             a model of some hundred million numbers, which cannot follow instructions
    instructions, language, tries    as for every Rewriter

    Raises ModuleNotFoundError without transformers, FileNotFoundError for a folder that is not there.
    """

    def __init__(
        self,
        folder,
        *,
        instructions="wan",
        language=None,
        tries=4,
        device="cpu",
        dtype=None,
        free=False,
        scale=1.0,
        form=False,
    ):
        super().__init__(instructions, language, tries)
        self.folder, self.free, self.scale, self.form = _there(folder), free, scale, form
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Transformers needs transformers; run: pip install transformers"
            ) from error
        where, how = self.folder, {"local_files_only": True}
        packed = where.is_file()
        if packed:
            where, how = where.parent, how | {"gguf_file": where.name}
        self.tokenizer = AutoTokenizer.from_pretrained(where, **how)
        # Unpacked once, and not in every layer of every step, which is five times slower.
        dense = {"quantization_config": _dense()} if packed else {}
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or "auto", **how, **dense)
        self.model = model.to(device).eval()
        self.reader = Reader(self.model, self._encode)

    def __repr__(self):
        return f"Transformers({str(self.folder)!r})"

    def answer(self, messages, instructions, attempt):
        import torch

        if self.form and instructions.form:
            # The last turn is a sentence, a line break, and the wish as JSON: see Instructions.quoted.
            wish = json.loads(messages[-1]["content"].partition("\n")[2])
            return instructions.form.filled(wish, self.reader)
        asked, how = self._asked(messages), {}
        start = asked["input_ids"].shape[1]
        if self.scale != 1:
            nothing = [*messages[:-1], {"role": "user", "content": instructions.quoted("")}]
            how |= {"guidance_scale": self.scale, "negative_prompt_ids": self._asked(nothing)["input_ids"]}
        if instructions.slots and not self.free:
            slots, end = tokens_of(instructions.slots, self._encode), self.tokenizer.eos_token_id
            how["prefix_allowed_tokens_fn"] = lambda _, ids: sorted(
                following(slots, ids[start:].tolist(), end)
            )
        # The likeliest answer first. Asked again it would be the same, so later tries draw.
        how |= {"do_sample": True, "temperature": 0.7} if attempt else {"do_sample": False}
        # `generate` draws from torch's own random state, which afterwards is as it was.
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(attempt)
            ids = self.model.generate(
                **asked, **how, max_new_tokens=TOKENS, pad_token_id=self.tokenizer.eos_token_id
            )
        return self.tokenizer.decode(ids[0, start:], skip_special_tokens=True)

    def _asked(self, messages):
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(self.model.device)

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)


class MLX(Rewriter):
    """A language model in a folder, run by mlx-lm (Apple silicon; on Linux its CPU build).

    folder   in the format of mlx-lm, which reads Hugging Face's of most models, too
    free, instructions, language, tries    as for Transformers
    """

    def __init__(self, folder, *, instructions="wan", language=None, tries=4, free=False):
        super().__init__(instructions, language, tries)
        self.folder, self.free = _there(folder), free
        try:
            from mlx_lm import load
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "MLX needs mlx-lm; run: pip install 'moddiff[mlx]' (in a clone: pip install -e '.[mlx]')"
            ) from error
        self.model, self.tokenizer = load(str(self.folder))

    def __repr__(self):
        return f"MLX({str(self.folder)!r})"

    def answer(self, messages, instructions, attempt):
        import mlx.core as mx
        from mlx_lm import generate
        from mlx_lm.sample_utils import make_sampler

        asked = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        mx.random.seed(attempt)
        how = {"sampler": make_sampler(temp=0.7 if attempt else 0.0), "max_tokens": TOKENS}
        if instructions.slots and not self.free:
            how["logits_processors"] = [self._held_to(instructions.slots, len(asked))]
        return generate(self.model, self.tokenizer, asked, **how)

    def _held_to(self, slots, start):
        import mlx.core as mx

        slots, end = tokens_of(slots, self._encode), self.tokenizer.eos_token_id

        def allow(ids, scores):
            allowed = mx.array(sorted(following(slots, ids[start:].tolist(), end)))
            held = mx.full(scores.shape, -mx.inf, dtype=scores.dtype)
            held[:, allowed] = scores[:, allowed]
            return held

        return allow

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)


def tokens_of(slots, encode):
    """The choices of each slot as lists of tokens."""
    return [[encode(choice) for choice in choices] for choices in slots]


def following(slots, done, end):
    """Which tokens may come after `done` in a sentence of these slots: a set, {end} once it is whole."""
    if not slots:
        return {end} if done[:1] in ([], [end]) else set()
    found = set()
    # Two choices may begin with the same tokens ("a red", "a round"): every one that still fits is followed.
    for choice in slots[0]:
        if len(done) < len(choice) and choice[: len(done)] == done:
            found.add(choice[len(done)])
        elif choice == done[: len(choice)]:
            found |= following(slots[1:], done[len(choice) :], end)
    return found


def _dense():
    """What tells transformers to unpack a .gguf file; None for versions before 5, which always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return config and config(dequantize=True)


def _there(folder):
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"there is no {folder}; expected a folder with a language model")
    return folder
