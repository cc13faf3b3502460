"""What does a worker do?  It loads a pipeline once, and makes one run after another of it.

Ray holds one in a process, `ray.remote(Worker)`. What comes to it are words and arrays, and what leaves it is
a run as it goes on record: it has no file of its own.
"""

import torch

from ..experiments.asking import spoken
from ..experiments.keeping import Store, with_fingerprints
from ..experiments.recipes import recipe
from ..settings import complete
from ..weights import load


class Worker:
    """One pipeline in a process.   threads: of torch, as the sums of a run may depend on their number"""

    def __init__(self, threads):
        torch.set_num_threads(threads)
        self.pipe, self.kept = None, None

    def load(self, model):
        """Load the pipeline.   model: arguments of moddiff.load -> its recipe, with the fingerprints"""
        self.pipe = load(**model)
        return with_fingerprints(recipe(self.pipe), self.pipe)

    def refused(self, asked, arrays):
        """The first run that cannot be, of [(prompt, words of its options)].   -> (which, error), or None"""
        for which, (prompt, words) in enumerate(asked):
            try:
                complete(self.pipe, prompt, spoken(words, arrays.__getitem__))
            except (ValueError, TypeError) as error:
                return which, error
        return None

    def run(self, prompt, words, arrays):
        """One run.   -> what Store.write takes of it; where it raises, `last` has that"""
        self.kept = None
        options = spoken(words, arrays.__getitem__)
        self.pipe(prompt, progress=False, store=Carried(self), **options)
        return self.kept

    def last(self):
        return self.kept


class Carried(Store):
    """A Store without a file: what it should write is left with the worker."""

    def __init__(self, worker):
        self.worker, self.experiment = worker, None

    def write(self, *kept):
        self.worker.kept = kept
        return None
