"""How does a model that is too small to follow instructions make a caption?  It fills in a form.

One short question for each word of the caption, after some that were answered, and a closed list of choices.
Each choice is scored by the probability of its tokens. A small model has favourite words; so what a choice
scores on average over wishes of all kinds is taken off (Zhou et al. 2023, arXiv 2309.17249).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Question:
    """One word of a caption.

    ask      the question, put behind the wish
    choices  what it may be
    shown    pairs (wish, choice), answered before
    """

    ask: str
    choices: tuple
    shown: tuple

    def text(self, wish):
        lines = [f'"{plain}" {self.ask} {choice}\n' for plain, choice in (*self.shown, (wish, ""))]
        return "".join(lines).rstrip()


@dataclass(frozen=True)
class Form:
    """Questions by name, and what makes a caption of their answers: caption(**{name: choice}).

    usual  wishes of all kinds, over which the scores of a choice are averaged
    """

    questions: dict
    caption: Callable
    usual: tuple

    def averages(self, score):
        """{name: what its choices score on average}, once for a model."""
        return {
            name: torch.stack([score(question.text(wish), question.choices) for wish in self.usual]).mean(0)
            for name, question in self.questions.items()
        }

    def filled(self, wish, score, averages):
        """The caption of a wish.   score: (text, choices) -> the log-probability of each choice, a tensor"""
        answers = {}
        for name, question in self.questions.items():
            over = score(question.text(wish), question.choices) - averages[name]
            answers[name] = question.choices[int(over.argmax())]
        return self.caption(**answers)


@torch.no_grad()
def scores(model, encode, text, choices):
    """log p(choice | text) for each choice, by a causal language model of transformers."""
    start = encode(text)
    out = model(torch.tensor([start], device=model.device), use_cache=True)
    first, cache, found = out.logits[0, -1].float().log_softmax(-1), out.past_key_values, []
    for choice in choices:
        ids = encode(" " + choice)
        found.append(first[ids[0]])
        if ids[1:]:
            more = model(torch.tensor([ids[:-1]], device=model.device), past_key_values=cache)
            after = more.logits[0].float().log_softmax(-1)
            found[-1] = found[-1] + after[range(len(ids) - 1), ids[1:]].sum()
            cache.crop(1 - len(ids))  # the next choice starts behind the same text
    return torch.stack(found)
