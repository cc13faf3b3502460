"""How does a model that is too small to follow instructions make a caption?  It fills in a form.

For each word of a caption there is a closed list of choices, and some answered examples in the wish's own
language. A choice is scored in two directions: how probable it is after the wish, and how probable the wish
is after it (the "noisy channel" of Min et al. 2022, arXiv 2108.04106). A small model has favourite words; so
what a choice scores on average over wishes of all kinds is taken off (Zhou et al. 2023, arXiv 2309.17249).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Question:
    """One word of a caption, asked in one language.

    names  what a caption may say, with what that is called in the examples: {choice: name}
    shown  pairs (wish, choice), answered before
    back   how much the other direction counts: log p(wish | choice); 0 spares its time
    """

    names: dict
    shown: tuple
    back: float = 0.0

    def examples(self):
        """The answered ones, one a line, the same for every wish."""
        return "".join(f"{wish} -> {self.names[choice]}\n" for wish, choice in self.shown)

    def examples_back(self):
        return "".join(f"{self.names[choice]} -> {wish}\n" for wish, choice in self.shown)


@dataclass(frozen=True)
class Form:
    """Questions by name, and what makes a caption of their answers: caption(**{name: choice}).

    questions  {language: {name: Question}}
    usual      {language: wishes of all kinds}, over which the scores of a choice are averaged
    """

    questions: dict
    caption: Callable
    usual: dict

    def filled(self, wish, reader):
        """The caption of a wish, by a Reader."""
        language = reader.language(self, wish)
        usual, answers = reader.usual(self, language), {}
        for name, question in self.questions[language].items():
            over = reader.scores(question, wish) - usual[name]
            answers[name] = list(question.names)[int(over.argmax())]
        return self.caption(**answers)


class Reader:
    """How probable a causal language model of transformers finds a choice.

    It keeps what no wish changes: the keys and values of the examples, and the averages.
    """

    def __init__(self, model, encode):
        self.model, self.encode, self.read, self.averages = model, encode, {}, {}

    def scores(self, question, wish):
        """log p(choice | examples, wish), and `back` times log p(wish | examples, choice).   -> [choices]"""
        wish = " ".join(wish.split())  # a line of its own would end it
        names = question.names.values()
        asked = self.begun(f"{wish} ->", self.begun(question.examples()))
        found = self.told(asked, [("", f" {name}") for name in names])
        if question.back:
            examples = self.begun(question.examples_back())
            found = found + question.back * self.told(
                examples, [(f"{name} ->", f" {wish}") for name in names]
            )
        return found

    def language(self, form, wish):
        """After whose examples is the wish itself most probable?  The model knows what goes with what."""
        wish = " ".join(wish.split())

        def likely(language):
            first = next(iter(form.questions[language].values()))
            return self.told(self.begun(first.examples()), [("", wish)])[0]

        return max(form.questions, key=likely)

    def usual(self, form, language):
        """{name: what each choice scores on average}, found once."""
        key = id(form), language
        if key not in self.averages:
            self.averages[key] = {
                name: torch.stack([self.scores(question, wish) for wish in form.usual[language]]).mean(0)
                for name, question in form.questions[language].items()
            }
        return self.averages[key]

    @torch.no_grad()
    def begun(self, text, before=None):
        """The model behind a text: its keys and values, and what it expects next. Without `before` kept."""
        if before is None and text in self.read:
            return self.read[text]
        ids = torch.tensor([self.encode(text)], device=self.model.device)
        # A pass writes into the keys and values that it is given, so it gets a copy.
        out = self.model(ids, past_key_values=before and copy.deepcopy(before[0]), use_cache=True)
        found = out.past_key_values, out.logits[:, -1:]
        if before is None:
            self.read[text] = found
        return found

    @torch.no_grad()
    def told(self, begun, pairs):
        """log p(end | what was begun, start) for each pair (start, end), in one pass.   -> [pairs]"""
        cache, next_one = begun
        starts, ends = ([self.encode(text) if text else [] for text in texts] for texts in zip(*pairs))
        longest = max(len(start + end) for start, end in zip(starts, ends))
        # What is put behind a shorter row changes nothing before it, and is not looked at.
        rows = [start + end + [0] * (longest - len(start + end)) for start, end in zip(starts, ends)]
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
        logits = self.model(torch.tensor(rows, device=self.model.device), past_key_values=cache).logits
        logits = torch.cat([next_one.expand(len(rows), -1, -1), logits], 1)  # [:, i] is of token i
        sums = []
        for row, start, end in zip(logits, starts, ends):
            after = row[len(start) : len(start + end)].float().log_softmax(-1)
            sums.append(after[range(len(end)), end].sum())
        return torch.stack(sums)
