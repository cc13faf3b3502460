"""How are many runs shared out?  Prompts x seeds x settings over workers, each on record once.

    made = cluster.generate("runs.sqlite", prompts, seeds=range(10), settings=[{"scale": 3.0}, {}])

A worker is a process with a pipeline of its own; Ray starts it where there is room. Only the process that
called `generate` writes the file, so no disk is shared, and a run that arrives twice is written once.
"""

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product

from tqdm import tqdm

from ..experiments import ledger
from ..experiments.asking import written
from ..experiments.keeping import Store, done
from ..experiments.recipes import objects_in
from ..hooks.records import HasTable, Table
from ..settings import check_names
from .crew import ERROR, Crew
from .starting import joined, load_words


@dataclass
class Made(HasTable):
    """What a call of `generate` did.

    numbers  of each run asked for, in order: its number in the file, or None where it failed
    new      how many this call made;  failed: {which: its error}, on record too
    lost     how often a worker ended in the midst of a run
    seconds  from the first run handed out to the last one written;  busy: the share of this time in which
             the workers computed, all of them together
    """

    file: str
    numbers: list
    new: int = 0
    failed: dict = field(default_factory=dict)
    lost: int = 0
    seconds: float = 0.0
    busy: float = 0.0

    def table(self):
        rows = [("asked for", len(self.numbers)), ("made now", self.new), ("failed", len(self.failed))]
        rows += [("workers lost", self.lost)]
        rows += [(f"failed: {which}", error) for which, error in self.failed.items()]
        return Table((str(self.file), ""), rows)


def generate(
    file,
    prompts,
    seeds=(0,),
    settings=({},),
    *,
    model="tiny",
    workers=None,
    threads=1,
    gpus=0,
    tries=3,
    address=None,
    progress=None,
):
    """Every prompt with every seed and every setting, over the workers of a Ray cluster, into a file of runs.

    file      of runs, as for pipe(store=): made where there is none. What it has already is not made again
    prompts   [str];  seeds: whole numbers from 0;  settings: dicts of what else the pipeline is called with
    model     a name or a folder, or a dict of arguments of `moddiff.load`, with profile= for extensions
    workers   how many; None: as many as the cluster has room for
    threads   of each worker, the CPUs it takes;  gpus: that it takes, then with model={..., "device": "cuda"}
    tries     how often a run is begun whose worker ends in its midst, before it counts as failed
    address   of the cluster, as ray.init takes it; None: that of RAY_ADDRESS, else this machine alone
    progress  True: a bar;  None: one in a terminal
    ->        Made

    A run that raises is on record with its error, the others go on, and the next call tries it again.

    Raises, before anything runs: ValueError or TypeError for settings that cannot be, what `moddiff.load`
    raises in a worker, NoRoom, ConnectionError without a cluster, ImportError without Ray. NoRoom too, where
    every node is gone in the midst: what was made is in the file. Guide: guides/scale.md
    """
    store, model = Store(file), load_words(model)
    asked, arrays = listed(prompts, seeds, settings)
    ray, ours = joined(address)
    crew = None
    try:
        crew = Crew(ray, model, workers, threads, gpus)
        found = crew.first()
        crew.refuse(asked, arrays)
        made = Made(file, [None] * len(asked))
        # A run is known by what it was asked for and by the weights, which only a worker has: hence `found`.
        todo = missing(store, made, asked, found)
        shown = None if progress is None else not progress
        for one in tqdm(crew.ended(todo, arrays, tries), total=len(todo), unit="run", disable=shown):
            _keep(store, made, one)
        made.lost, made.seconds, made.busy = crew.lost, crew.seconds, crew.busy
        return made
    finally:
        if crew is not None:
            crew.dismiss()
        if ours:  # a cluster that somebody else has joined stays
            ray.shutdown()


# ---- what is asked for -----------------------------------------------------------------------------------


def listed(prompts, seeds, settings):
    """All runs, prompts outermost.   -> ([(prompt, words of its options)], {digest: array} of their pictures)

    Raises ValueError or TypeError for what does not travel.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts={prompts!r} is one text; expected a list of them")
    asked, arrays = [], {}
    ready = [_words(setting, arrays) for setting in settings]
    for prompt, seed, words in product(prompts, seeds, ready):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(
                f"seed {seed!r}; expected whole numbers from 0: one that is drawn could not be found again"
            )
        asked.append((prompt, words | {"seed": seed}))
    if not asked:
        raise ValueError("nothing is asked for: prompts, seeds and settings each need at least one")
    return asked, arrays


def _words(setting, arrays):
    if not isinstance(setting, dict):
        raise TypeError(f'a setting is {setting!r}; expected a dict such as {{"scale": 3.0}}')
    check_names(setting)
    if "seed" in setting:
        raise ValueError("seeds have an argument of their own: seeds=[...]")
    if setting.get("rewrite") is not None:
        raise ValueError(
            "rewrite= asks a language model each time; rewrite the prompts before, and give those"
        )
    _, words, found = written(setting)
    if odd := objects_in(words):
        raise ValueError(f"{odd} was made by hand and does not travel; give it by its registered name")
    arrays |= found
    return words


@dataclass
class Todo:
    """A run that is missing.

    places  where in the list of those asked for;  begun: how often
    kept    how it ended, as Store.write takes it
    """

    key: str
    prompt: str
    words: dict
    places: list
    begun: int = 0
    kept: tuple = None


def missing(store, made, asked, found):
    """The runs that the file has not yet; the numbers of the others go into `made`.   -> [Todo]"""
    with closing(ledger.connect(store.file)) as db:
        there = done(db)
    todo = {}
    for place, (prompt, words) in enumerate(asked):
        key = key_of(prompt, words, found)
        if key in there:
            made.numbers[place] = there[key]
        else:
            todo.setdefault(key, Todo(key, prompt, words, [])).places.append(place)
    return list(todo.values())


def key_of(prompt, words, found):
    """By what a run is known again: all that was asked for, and the fingerprint of each part."""
    parts = {role: part["fingerprint"] for role, part in found["parts"].items()}
    about = [prompt, words, parts, found["defaults"], found["negative"]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _keep(store, made, one):
    """One run that ended, on record."""
    row, record, packed = one.kept
    number, error = store.write(row, record | {"key": one.key}, packed), row[ERROR]
    made.new += error is None
    for place in one.places:
        if error is None:
            made.numbers[place] = number
        else:
            made.failed[place] = error
