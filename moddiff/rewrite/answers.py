"""When is an answer a prompt?  Thoughts, wrappings and refusals of language models, and the way back to the
original."""

import re
import warnings
from reprlib import repr as brief

from ..settings import Note
from .instructions import TINY, WAN, Instructions

THOUGHT = r"(think|thinking|thought|reasoning)"
LEAD = re.compile(
    r"^(sure|certainly|of course|here is|here's|okay|ok)\b[^\n]{0,80}:\s*\n|"
    r"^(rewritten |revised |new |final )?(prompt|caption|answer)\s*:\s*|"
    r"^(好的|以下是|改写后)[^\n]{0,30}[:：]\s*\n|^(改写|描述|答案)\s*[:：]\s*",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"^(i'?m (very |really )?sorry|sorry,|i (cannot|can'?t|can not|won'?t|am unable|'m unable|am not able)\b|"
    r"i'm (unable|not able)\b|i must decline|as an ai\b|unfortunately,? i\b|"
    r"(非常|很)?抱歉|对不起|我(无法|不能|没有办法)|作为(一个|一名)?(AI|人工智能))",
    re.IGNORECASE,
)
WRAPPED = (('"', '"'), ("“", "”"), ("「", "」"), ("'", "'"), ("**", "**"), ("`", "`"))


class Unanswered(Exception):
    """No answer, or none that can be used; the message says why. Another try may help."""


class Rewriter:
    """A language model as a component of the role "rewrite": `pipe(prompt, rewrite=Chat(...))`.

    instructions  "wan", "tiny", or Instructions of your own
    language      "en", "zh": of the caption; None: Chinese for a prompt with Chinese characters, else English
    tries         how often it is asked before the original prompt is used

    A subclass has `answer(messages, instructions, attempt)`: the text as it came, or Unanswered.
    """

    sees = False  # does it take the first frame as a second argument?

    def __init__(self, instructions="wan", language=None, tries=4):
        known = {"wan": WAN, "tiny": TINY}
        if not isinstance(instructions, Instructions) and instructions not in known:
            raise ValueError(
                f"instructions={brief(instructions)}; expected 'wan', 'tiny' or rewrite.Instructions(...)"
            )
        if language not in (None, "en", "zh"):
            raise ValueError(f"language={brief(language)}; expected 'en', 'zh', or None: by the prompt")
        if not isinstance(tries, int) or tries < 1:
            raise ValueError(f"tries={brief(tries)}; expected a whole number from 1 on")
        self.instructions, self.language, self.tries = known.get(instructions, instructions), language, tries

    def __call__(self, prompt, image=None):
        """str -> str: the model's caption, or the prompt as it came, with a Note why.

        image  [3, H, W] in [-1, 1], the first frame; only for those that `sees`
        """
        told = self._told(prompt)
        messages = told.messages(prompt, None if image is None else data_url(image))
        for attempt in range(self.tries):
            try:
                return checked_answer(self.answer(messages, told, attempt), told)
            except Unanswered as error:
                why = str(error)
                if not self.go_on(attempt, error):
                    break
        warnings.warn(f"the prompt was not rewritten, and is used as it came: {why}", Note, stacklevel=2)
        return prompt

    def _told(self, prompt):
        if isinstance(self.instructions, Instructions):
            return self.instructions
        by_prompt = "zh" if re.search("[\u4e00-\u9fff]", prompt) else "en"
        return self.instructions[self.language or by_prompt]

    def go_on(self, attempt, error):
        """Is there to be another try after this error?  Here is the room to wait for it."""
        return True

    def answer(self, messages, instructions, attempt):
        raise NotImplementedError


def checked_answer(text, instructions):
    """A caption out of the text that a model sent.   Raises Unanswered for what is none."""
    caption = unwrapped(without_thoughts(text))
    if not caption:
        raise Unanswered("the language model's answer was empty")
    if REFUSAL.match(caption):
        raise Unanswered(f"the language model refused: {brief(caption)}")
    if len(caption) > instructions.most:
        raise Unanswered(
            f"the answer has {len(caption)} letters; a caption has at most {instructions.most}: "
            f"{brief(caption)}"
        )
    if instructions.fault and (fault := instructions.fault(caption)):
        raise Unanswered(f"{fault}: {brief(caption)}")
    return caption


def without_thoughts(text):
    """A text without what a model thought aloud before it."""
    text = re.sub(rf"(?is)<{THOUGHT}>.*?</\1>", "", text)
    # Templates may open the thought for the model: then only its end is in the answer.
    text = re.split(rf"(?i)</{THOUGHT}>", text)[-1]
    # And one that is still open was cut off in the middle: there is no answer.
    return re.split(rf"(?i)<{THOUGHT}>", text)[0]


def unwrapped(text):
    """One line, without code fences, "Here is the prompt:", and quotation marks around the whole."""
    text = re.sub(r"(?m)^```\w*\s*$", "", text).strip()
    text = LEAD.sub("", text, count=1).strip()
    for first, last in WRAPPED:
        inner = text[len(first) : -len(last)]
        if text.startswith(first) and text.endswith(last) and first not in inner and last not in inner:
            text = inner.strip()
    return " ".join(text.split())


def data_url(image, longest=512):
    """A picture [3, H, W] in [-1, 1] as a data URL of PNG, as chat servers take it, and at most so long."""
    import base64
    import io

    from PIL import Image

    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((longest, longest))
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
