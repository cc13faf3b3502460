"""Sixty films on two nodes of which one is killed: all there once, and the bytes of one process.

Needs Ray, and some minutes: pip install "moddiff[ray]"; pytest tests/benchmark/test_cluster.py -s
"""

import os
import sys
import threading
import time

import pytest
import torch

import moddiff
from moddiff import cluster
from moddiff.experiments import runs

PROMPTS = [
    f"a {colour} {shape} moving left on a black background"
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square")
]
SHORT = dict(steps=4, frames=5)


@pytest.fixture
def nodes(monkeypatch):
    """A cluster at 127.0.0.1: a head without room for workers, and two nodes of one CPU."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else Ray resolves localhost to the network
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    import ray
    from ray.cluster_utils import Cluster

    here = {"node_ip_address": "127.0.0.1"}
    made = Cluster(True, head_node_args=here | {"num_cpus": 0, "include_dashboard": False})
    try:
        yield made, [made.add_node(num_cpus=1, **here) for _ in range(2)]
    finally:
        ray.shutdown()  # first this program lets go of its node
        made.shutdown()


def kill_after(count, file, made, nodes):
    import ray

    while len(runs(file)) < count:
        time.sleep(0.1)
    # On one machine this program hangs on to any node that it finds, and that one cannot be taken from it.
    mine = ray._private.worker.global_worker.node.raylet_socket_name
    others = [node for node in nodes if node.raylet_socket_name != mine]
    made.remove_node(others[-1], allow_graceful=False)


def test_sixty_films_on_two_nodes_of_which_one_is_killed(nodes, tmp_path):
    made, workers = nodes
    calm, file = tmp_path / "calm.sqlite", tmp_path / "runs.sqlite"
    whole = cluster.generate(calm, PROMPTS, range(10), [SHORT], address=made.address)
    print(f"60 films, two workers: {whole.seconds:.1f} s, {whole.busy:.3f} of the sum of the workers")
    cluster.generate(file, PROMPTS[:1], range(1), [SHORT], address=made.address)
    killer = threading.Thread(target=kill_after, args=(10, file, made, workers))
    killer.start()
    found = cluster.generate(file, PROMPTS, range(10), [SHORT], address=made.address)
    killer.join()
    print(f"one node killed after 10: {found.seconds:.1f} s, {found.lost} worker lost")
    assert found.lost == 1 and found.new == 59 and not found.failed
    assert sorted(found.numbers) == list(range(1, 61)) and len(runs(file)) == 60

    torch.set_num_threads(1)
    pipe = moddiff.load("tiny")
    kept = {one.id: one.video for one in runs(file)}
    asked = [(prompt, seed) for prompt in PROMPTS for seed in range(10)]
    for (prompt, seed), number in zip(asked, found.numbers):
        assert kept[number] == pipe(prompt, seed=seed, **SHORT)
    # A calm machine: on a busy one the time between two runs is the scheduler's.
    assert whole.busy >= 0.9


def test_a_part_on_an_actor_of_a_real_cluster(nodes):
    made, _ = nodes
    pipe = moddiff.load("tiny")
    text = cluster.actor("text", "tiny", address=made.address)
    assert pipe.replace(text=text)(PROMPTS[0], **SHORT) == pipe(PROMPTS[0], **SHORT)
