"""Is each run of many on record once, whoever is gone, and is a part on an actor the part that it is here?

Ray itself is in tests/benchmark/test_cluster.py. Here a small one of this process stands for it, in which a
worker ends when a test wants it to.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from small import CAPTIONS, release

import moddiff
from moddiff import capture, cluster
from moddiff.cluster import actors, many, worker
from moddiff.experiments import runs
from moddiff.remote import RemoteError

SHORT = dict(steps=2, frames=5, size=(32, 48))


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class GetTimeoutError(RayError):
    pass


class Ray:
    """What `moddiff.cluster` uses of Ray, one call after another.

    nodes  the CPUs of each;  ends: the counts of calls of `run` in whose midst the worker's process ends
    """

    exceptions = SimpleNamespace(
        RayError=RayError, RayTaskError=RayTaskError, GetTimeoutError=GetTimeoutError
    )

    def __init__(self, nodes=(1, 1), ends=()):
        self.cpus, self.ends, self.begun, self.told = list(nodes), ends, 0, {}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": float(count)}} for count in self.cpus]

    def remote(self, **needs):
        return lambda kind: Kind(self, kind)

    def wait(self, refs, timeout):
        return (refs[:1], refs[1:]) if self.cpus else ([], refs)

    def get(self, ref, timeout=None):
        held, name, args = ref.held, ref.name, ref.args
        if name == "run":
            self.begun += 1
        if not held.lives or (name == "run" and self.begun in self.ends):
            held.lives = False
            raise RayError("the actor died")
        try:
            return getattr(held.made, name)(*args)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise RayTaskError(error) from None

    def kill(self, held):
        held.lives = False


class Kind:
    def __init__(self, ray, kind):
        self.ray, self.kind = ray, kind

    def options(self, **where):
        self.ray.told = where
        return self

    def remote(self, *args):
        return Held(self.kind(*args))


class Call:
    def __init__(self, held, name, args):
        self.held, self.name, self.args = held, name, args


class Held:
    """An actor's handle: `held.run.remote(...)` is what Ray will answer."""

    def __init__(self, made):
        self.made, self.lives = made, True

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *args: Call(self, name, args))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs.sqlite"


@pytest.fixture
def generate(monkeypatch, folder, file):
    """cluster.generate into `file` of the small release, on a Ray that is given."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process, too

    def run(ray, prompts=CAPTIONS[:1], seeds=(0, 1), settings=(SHORT,), model=folder, **how):
        for module in (many, actors):
            monkeypatch.setattr(module, "joined", lambda address: (ray, False))
        return cluster.generate(file, prompts, seeds, settings, model=model, **how)

    return run


# ---- many runs ----


def test_all_runs_are_there_once_where_a_worker_ends_in_the_midst(generate, file, folder):
    made = generate(Ray(ends=(2,)), CAPTIONS[:2], range(3))
    assert made.lost == 1 and made.new == 6 and not made.failed
    assert sorted(made.numbers) == [1, 2, 3, 4, 5, 6] and len(runs(file)) == 6
    pipe = moddiff.load(folder)
    for number, (prompt, seed) in zip(made.numbers, [(p, s) for p in CAPTIONS[:2] for s in range(3)]):
        kept = next(one for one in runs(file) if one.id == number)
        assert kept.video == pipe(prompt, seed=seed, **SHORT)


def test_the_next_call_makes_only_what_is_missing(generate, file):
    first = generate(Ray(), seeds=(0, 1))
    ray = Ray()
    second = generate(ray, seeds=(2, 1, 0))
    assert ray.begun == second.new == 1 and second.numbers == [3, *reversed(first.numbers)]


def test_what_is_asked_for_twice_is_made_once(generate, file):
    made = generate(Ray(), [CAPTIONS[0]] * 2, (4,))
    assert made.numbers == [1, 1] and len(runs(file)) == 1


def test_other_weights_are_other_runs(generate, file, tmp_path):
    generate(Ray(), seeds=(0,))
    other = tmp_path / "other"
    other.mkdir()
    release(other)
    changed = dict(where=other, profile={"dit": [["quantized", "int8"]]})
    assert generate(Ray(), seeds=(0,), model=changed).new == 1


def test_a_run_that_raises_is_on_record_and_the_others_go_on(generate, file, monkeypatch, folder):
    real, broken = worker.load, []

    def load(**how):
        pipe = real(**how)
        decode = pipe.vae.decode

        def breaks(latent, **options):
            broken.append(latent)
            if len(broken) == 1:
                raise RuntimeError("no memory is left")
            return decode(latent, **options)

        pipe.vae.decode = breaks
        return pipe

    monkeypatch.setattr(worker, "load", load)
    made = generate(Ray((1,)), seeds=(0, 1, 2))
    assert made.new == 2 and made.numbers == [None, 2, 3]
    assert "no memory is left" in made.failed[0] and "no memory" in str(made)
    assert [one.status for one in runs(file)] == ["done", "done", "failed"]
    assert generate(Ray((1,)), seeds=(0, 1, 2)).numbers == [4, 2, 3]


def test_a_run_that_ends_every_worker_fails_in_the_end(generate, file):
    made = generate(Ray((1,), ends=(1, 2, 3)), seeds=(0, 1))
    assert made.numbers[0] is None and made.numbers[1] and made.lost == 3
    assert "its worker ended each of 3 times" in made.failed[0]
    assert "3 times" in next(one for one in runs(file) if one.status == "failed").error


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(prompts="one text"), "expected a list"),
        (dict(seeds=(-1,)), "whole numbers from 0"),
        (dict(seeds=()), "at least one"),
        (dict(settings=[{"seed": 3}]), "seeds="),
        (dict(settings=[{"rewrite": "x"}]), "rewrite the prompts before"),
        (dict(settings=[{"guidance_scale": 3}]), "scale=5.0"),
        (dict(settings=["scale"]), "expected a dict"),
        (dict(settings=[{"solver": object()}]), "registered name"),
        (dict(settings=[SHORT, SHORT | {"frames": 6}]), "run 1 of 4"),
        (dict(workers=0), "1 or more"),
        (dict(model={"dit": object()}), "holds an object"),
        (dict(model={"where": 3}), "holds an object .where=3"),
    ],
    ids=lambda case: str(case)[:30],
)
def test_what_cannot_be_is_refused_before_any_run(generate, file, wrong, says):
    ray = Ray()
    with pytest.raises((ValueError, TypeError), match=says):
        generate(ray, **wrong)
    assert ray.begun == 0 and runs(file) == []


def test_a_worker_that_cannot_load_says_why(generate, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        generate(Ray(), model=tmp_path / "nowhere")


def test_workers_with_different_weights_are_refused(generate, monkeypatch):
    real, count = worker.load, []

    def load(**how):
        pipe = real(**how)
        count.append(pipe)
        with torch.no_grad():
            next(pipe.dit.parameters()).add_(len(count) - 1)
        return pipe

    monkeypatch.setattr(worker, "load", load)
    with pytest.raises(ValueError, match="different weights: the dit"):
        generate(Ray(), seeds=range(4))


def test_no_room_is_said(generate, file):
    with pytest.raises(cluster.NoRoom, match="takes {'CPU': 4}"):
        generate(Ray((1, 2)), threads=4)

    class Gone(Ray):  # the nodes end with the second run
        def wait(self, refs, timeout):
            if self.begun == 2:
                self.cpus = []
            return super().wait(refs, timeout)

    with pytest.raises(cluster.NoRoom, match="the same call makes the rest"):
        generate(Gone((1,)), seeds=range(4))
    assert len(runs(file)) == 2


def test_without_ray_the_error_says_what_to_install(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"moddiff\[ray\]"):
        cluster.generate(file, ["a"], model="tiny")


# ---- a part on an actor ----


@pytest.fixture
def actor(monkeypatch, folder):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def make(role, ray=None, **how):
        monkeypatch.setattr(actors, "joined", lambda address: (ray or Ray(), False))
        return cluster.actor(role, folder, **how)

    return make


@pytest.mark.parametrize("role", ["text", "dit", "vae"])
def test_a_part_on_an_actor_gives_the_same_bytes(actor, folder, role):
    pipe = moddiff.load(folder)
    assert pipe.replace(**{role: actor(role)})(CAPTIONS[0], **SHORT) == pipe(CAPTIONS[0], **SHORT)


def test_one_looks_inside_an_actor_as_inside_a_model_here(actor, folder):
    here = moddiff.load(folder)
    there = here.replace(text=actor("text"))
    seen = []
    for pipe in (here, there):
        with capture(pipe, "text.layers.0.attn.probs") as one:
            pipe.text.encode(CAPTIONS[:1])
        seen.append(one["text.layers.0.attn.probs"])
    assert torch.equal(*seen)


def test_where_it_runs_is_said_in_rays_own_words(actor):
    ray = Ray()
    actor("text", ray, resources={"big": 1})
    assert ray.told == {"resources": {"big": 1}}


def test_errors_of_an_actor_are_those_of_a_part_elsewhere(actor, monkeypatch):
    text = actor("text")
    with pytest.raises(TypeError, match="must be a str"):
        text.encode([3])
    with pytest.raises(ValueError, match="role='solver'"):
        actor("solver")
    with pytest.raises(ValueError, match="has no image"):
        actor("image")
    text.server.part.lives = False
    with pytest.raises(RemoteError, match="its node is gone"):
        text.encode(CAPTIONS[:1])

    def late(ref, timeout):
        raise GetTimeoutError

    text.server.ray.get = late
    with pytest.raises(RemoteError, match="no answer within 60 s"):
        text.encode(CAPTIONS[:1])
