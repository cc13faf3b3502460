"""Does a rewriter make the tiny model obey people's own words?  40 free prompts, before and after, judged.

    python guides/figures/rewrite_claim.py FOLDER [-o guides/figures/rewrite.json] [-n 40]
    python guides/figures/rewrite_claim.py FOLDER --told -o guides/figures/rewrite_told.json

FOLDER holds the language model, as `rewrite.Transformers` takes it; without it only "before" is measured.
Interrupted, it goes on where it stopped. The model fills in the form, and nothing is drawn; with --told it is
large enough for instructions: it gets those of the tiny world, and is held to their sentences.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from free_prompts import PROMPTS
from kept import keep_beside
from tqdm.auto import tqdm

import moddiff
from moddiff.tiny import score, world

PARTS = ("shape", "colour", "motion", "background", "all")


def judged(pipe, prompt, scene, seed):
    """What the judge says of one video.   -> {part: bool}"""
    verdict = score.judge(pipe(prompt, seed=seed).frames, scene)
    return {part: np.array(verdict[part]) for part in PARTS}


def asked(rewriter, prompt):
    """What the form makes of a wish, and every number that led there."""
    form, reader = rewriter.instructions["en"].form, rewriter.reader
    language = reader.language(form, prompt)
    usual, questions = reader.usual(form, language), form.questions[language]
    return (
        {"caption": np.array(form.filled(prompt, reader)), "language": np.array(language)}
        | {f"scores {part}": reader.scores(questions[part], prompt).float().numpy() for part in questions}
        | {f"usual {part}": usual[part].float().numpy() for part in questions}
    )


def told(rewriter, prompt):
    """The caption of a model that is told what to do."""
    return {"caption": np.array(rewriter(prompt))}


def looked_into(rewriter, chosen, answers, keep):
    """What lesson 12 looks at: the wishes' meanings, all scores, and answers without the form."""
    moddiff.rewrite.local.TOKENS = 40  # of a free answer, which may go on for long
    return {
        "heard": sum(str(answer["language"]) == row[0] for answer, row in zip(answers, chosen)),
        "asked": {
            prompt: {"language": language, "background": scene.background}
            | {part: getattr(scene.things[0], part) for part in PARTS[:3]}
            for language, prompt, scene in chosen
        },
        "scores": {  # of every choice, and what it has on average; in the order of tiny.world
            prompt: {
                part: [np.round(answer[f"{kind} {part}"], 2).tolist() for kind in ("scores", "usual")]
                for part in PARTS[:4]
            }
            for (_, prompt, _), answer in zip(chosen, answers)
        },
        "answers": {
            prompt: {
                kind: str(keep(f"{kind}-{world.stable_seed(prompt)}", make)["answer"])
                for kind, make in (
                    ("free", partial(freely, rewriter, prompt, True)),
                    ("held", partial(freely, rewriter, prompt, False)),
                )
            }
            for language, prompt, _ in chosen[:12]
            if language == "en"
        },
    }


def freely(rewriter, prompt, free):
    """The first words of the answer as it comes, with the instructions and examples: free, or held."""
    rewriter.form, rewriter.free, told = False, free, rewriter.instructions["en"]
    answer = rewriter.answer(told.messages(prompt), told, 0)
    rewriter.form = True
    return {"answer": np.array(answer[:200])}


def named(prompt, scene):
    """What the words alone say, without any video: which parts of the scene does the caption name?"""
    said = world.parse(prompt)
    if said is None or len(said.things) != len(scene.things):
        return dict.fromkeys(PARTS, False)
    right = {part: getattr(said.things[0], part) == getattr(scene.things[0], part) for part in PARTS[:3]}
    right["background"] = scene.background in (None, said.background)
    return right | {"all": all(right.values())}


def rates(verdicts):
    """{part: how many of them}"""
    return {part: int(sum(bool(verdict[part]) for verdict in verdicts)) for part in PARTS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="of the language model")
    parser.add_argument("-o", "--output", type=Path, default=Path("guides/figures/rewrite.json"))
    parser.add_argument("-n", type=int, default=len(PROMPTS))
    parser.add_argument("--told", action="store_true", help="ask with the instructions, not with the form")
    options = parser.parse_args()
    chosen = PROMPTS[: options.n]
    pipe = moddiff.load("tiny")
    keep = keep_beside(options.output, pipe)

    before = [
        keep(f"before-{world.stable_seed(prompt)}", partial(judged, pipe, prompt, scene, seed))
        for seed, (_, prompt, scene) in enumerate(tqdm(chosen, "before"))
    ]
    if options.folder is None:
        print(rates(before))
        return

    rewriter = moddiff.rewrite.Transformers(
        options.folder, instructions="tiny", language="en", form=not options.told, dtype=torch.bfloat16
    )
    ask = told if options.told else asked
    answers = [
        keep(f"{ask.__name__}-{world.stable_seed(prompt)}", partial(ask, rewriter, prompt))
        for _, prompt, _ in tqdm(chosen, "rewriting")
    ]
    captions = [str(answer["caption"]) for answer in answers]
    after = [
        keep(f"after-{world.stable_seed(caption, seed)}", partial(judged, pipe, caption, scene, seed))
        for seed, (caption, (_, _, scene)) in enumerate(zip(captions, tqdm(chosen, "after")))
    ]
    said = [named(caption, scene) for caption, (_, _, scene) in zip(captions, chosen)]
    facts = {
        "prompts": len(chosen),
        "before": rates(before),
        "after": rates(after),
        "words": rates(said),  # what the captions say, before any video is made
        "by language": {
            language: [
                sum(bool(v["all"]) for v, (spoken, *_) in zip(verdicts, chosen) if spoken == language)
                for verdicts in (before, after)
            ]
            for language in world.LANGUAGES
        },
        "captions": {prompt: caption for (_, prompt, _), caption in zip(chosen, captions)},
    }
    if not options.told:
        facts |= looked_into(rewriter, chosen, answers, keep)
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list a line
    options.output.write_text(text + "\n", encoding="utf-8")
    print({name: facts[name] for name in ("prompts", "before", "after", "words", "by language")})


if __name__ == "__main__":
    main()
