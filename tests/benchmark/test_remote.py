"""What does it cost to have a part elsewhere?  Run by hand: pytest tests/benchmark/test_remote.py -s"""

import re
import subprocess
import sys
import time
from contextlib import contextmanager

import torch

import moddiff
from moddiff.remote.components import Dit

PROMPT = "a red circle moving left on a black background"


@contextmanager
def command(*words):
    with subprocess.Popen(
        [sys.executable, "-m", "moddiff", "serve", "--port", "0", *words], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield re.search(r"http://\S+", process.stdout.readline())[0]
        finally:
            process.terminate()


ECHO = """
import sys, torch
from moddiff.remote.server import Service, http_server, listening
class Echo(torch.nn.Module):
    patch, channels, task = (1, 2, 2), 16, "t2v"
    def forward(self, x, t, text): return x
sock = listening("127.0.0.1", 0); sock.listen(16)
print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
http_server(Service({"dit": Echo()})).run(sockets=[sock])
"""


def seconds(function, times):
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken)


def test_a_call_that_does_nothing():
    with subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True) as process:
        try:
            echo = moddiff.remote(process.stdout.readline().strip(), "dit")
            assert isinstance(echo, Dit)
            for size, name in ((60 * 12, "46 kB"), (2**16, "4.2 MB"), (2**18, "16.8 MB")):
                x, t = torch.randn(1, 16, 1, 1, size), torch.tensor([1.0])
                assert torch.equal(echo(x, t, []), x)
                taken = seconds(lambda x=x, t=t: echo(x, t, []), 40)
                print(f"\n{name} there and back: {1000 * taken:.2f} ms a call", end="")
        finally:
            process.terminate()


@torch.no_grad()
def test_a_tiny_run_elsewhere():
    """In turn, so that both see the same machine."""
    pipe = moddiff.load("tiny")
    with command("--roles", "dit") as url:
        dit = moddiff.remote(url, "dit")
        text = pipe.text.encode([PROMPT])
        x, t = torch.randn(1, 16, *pipe.latent_shape()), torch.tensor([500.0])
        here, there = pipe.dit.prepare(text), dit.prepare(text)
        assert torch.equal(pipe.dit(x, t, here), dit(x, t, there))
        taken = {"here": [], "there": [], "inside": []}
        for _ in range(60):
            taken["here"].append(seconds(lambda: pipe.dit(x, t, here), 1))
            taken["there"].append(seconds(lambda: dit(x, t, there), 1))
            answer, _ = dit.asked("call", {"x": x, "t": t}, prompt=there.name)
            taken["inside"].append(answer["seconds"])
        passes = {name: 1000 * min(values) for name, values in taken.items()}
        share = (passes["there"] - passes["inside"]) / passes["inside"]
        print(
            f"\na pass of the tiny DiT: {passes['here']:.1f} ms here, {passes['there']:.1f} ms elsewhere",
            end="",
        )
        print(f", {passes['inside']:.1f} of them in the model: {100 * share:.1f} % more")
        assert share < 0.05
