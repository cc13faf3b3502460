"""Which worker is at what, and who does the work of one that is gone?  The workers of one call of `generate`.

Ray finds the nodes, starts the processes and says when one has ended. Here a list is kept of what each was
given, so that it can be given to another.
"""

import time
from collections import deque

from ..experiments.keeping import versions
from .worker import Worker

PATIENCE = 10.0  # seconds to wait for an answer, before looking whether anybody is left to give one
SECONDS, ERROR = 2, 6  # where in the row of a run, as keeping.INSERT has it, these two stand


class NoRoom(RuntimeError):
    """No node of the cluster has room for a worker, or none is left."""


class Crew:
    """Workers of one kind, as many as were asked for or as there is room for.

    at      {what Ray will answer: (worker, the Todo it is at; None while it loads)}
    lost    how often a worker ended in the midst of a run
    seconds, busy   as in many.Made
    """

    def __init__(self, ray, model, workers, threads, gpus):
        self.ray, self.model, self.threads = ray, model, threads
        self.kind = ray.remote(num_cpus=threads, num_gpus=gpus)(Worker)
        self.needs = {name: count for name, count in (("CPU", threads), ("GPU", gpus)) if count}
        room = self.room()
        if workers is not None and workers < 1:
            raise ValueError(
                f"workers={workers}; expected 1 or more, or None for as many as there is room for"
            )
        if not room:
            raise NoRoom(f"a worker takes {self.needs}, and no node has that; there are {self.nodes()}")
        self.at, self.all, self.found, self.lost = {}, [], None, 0
        self.computed, self.seconds, self.count = 0.0, 0.0, min(workers or room, room)
        for _ in range(self.count):
            self.hire()

    def nodes(self):
        """What each node that lives has, whoever uses it now."""
        had = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [{name: node.get(name, 0.0) for name in ("CPU", "GPU")} for node in had]

    def room(self):
        return sum(
            min(int(node[name] // count) for name, count in self.needs.items()) for node in self.nodes()
        )

    def hire(self):
        """One more worker: it loads as soon as a node has room for it."""
        worker = self.kind.remote(self.threads)
        self.all.append(worker)
        self.at[worker.load.remote(self.model)] = worker, None

    def dismiss(self):
        for worker in self.all:
            self.ray.kill(worker)

    def answers(self):
        """Wait for one or more answers.   Raises NoRoom where nobody is left"""
        while True:
            there, _ = self.ray.wait(list(self.at), timeout=PATIENCE)
            if there:
                return there
            if not self.room():
                raise NoRoom(
                    "no node that has room for a worker is left; what was made is in the file, and the same "
                    "call makes the rest"
                )

    # ---- before the work --------------------------------------------------------------------------------

    def first(self):
        """Wait for a worker that has loaded.   -> the recipe of its pipeline, or the error of its load"""
        ref = self.answers()[0]
        self.found = self.loaded(ref)
        self.ready, _ = self.at[ref]
        return self.found

    def loaded(self, ref):
        """What a worker has loaded; all of them must have the same."""
        try:
            found = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as raised:
            raise raised.cause from None
        for role, part in (self.found or found)["parts"].items():
            there = found["parts"][role]["fingerprint"]
            if there != part["fingerprint"]:
                raise ValueError(
                    f"two workers loaded different weights: the {role} component has the fingerprint "
                    f"{there} in one and {part['fingerprint']} in another; is {self.model['where']} the same "
                    "on all nodes?"
                )
        return found

    def refuse(self, asked, arrays):
        """Raise for the first run that cannot be, before any begins."""
        if refused := self.ray.get(self.ready.refused.remote(asked, arrays)):
            which, error = refused
            prompt, words = asked[which]
            raise type(error)(f"run {which} of {len(asked)}, {prompt!r} with {words}: {error}")

    # ---- the work ---------------------------------------------------------------------------------------

    def ended(self, todo, arrays, tries):
        """Hand out what is to do, and once more what was lost.   yields each Todo as it ends"""
        waiting, idle, start = deque(todo), [], time.perf_counter()
        while waiting or any(one for _, one in self.at.values()):
            for ref in self.answers():
                worker, one = self.at.pop(ref)
                try:
                    if one is None:
                        self.loaded(ref)
                    else:
                        one.kept = self.kept(ref, worker)
                    idle.append(worker)
                except self.ray.exceptions.RayError as gone:
                    one = self.again(worker, one, waiting, tries, gone)
                while idle and waiting:  # before the file is written: nobody waits for that
                    self.hand(idle.pop(), waiting.popleft(), arrays)
                if one is not None:
                    self.computed += one.kept[0][SECONDS]
                    self.seconds = time.perf_counter() - start
                    yield one

    @property
    def busy(self):
        return self.computed / (self.count * self.seconds) if self.seconds else 0.0

    def hand(self, worker, one, arrays):
        one.begun += 1
        needed = {digest: arrays[digest] for digest in arrays if digest in str(one.words)}
        self.at[worker.run.remote(one.prompt, one.words, needed)] = worker, one

    def kept(self, ref, worker):
        """How a run ended, as Store.write takes it; one that raised, with its error."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError:
            return self.ray.get(worker.last.remote())

    def again(self, worker, one, waiting, tries, gone):
        """Another worker in place of one that is gone, and its run once more.   -> the Todo, if too often"""
        self.ray.kill(worker)  # where only its answer was lost
        self.all.remove(worker)
        self.lost += 1
        if self.lost > tries * max(len(waiting), self.count):
            raise NoRoom(f"workers end again and again; the last one: {gone}")
        self.hire()
        if one is not None and one.begun >= tries:
            one.kept = self.unfinished(one, f"its worker ended each of {one.begun} times: {gone}")
            return one
        if one is not None:
            waiting.appendleft(one)
        return None

    def unfinished(self, one, error):
        """The record of a run that no worker finished."""
        name, told = self.found["name"], {"asked": one.words, "pipeline": self.found, "versions": versions()}
        told |= {"machine": {}, "timings": {}, "patches": [], "spans": None}
        return (None, time.time(), 0.0, "failed", name, one.prompt, error, None), told, {}
