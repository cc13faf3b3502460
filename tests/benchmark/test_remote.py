"""What does it cost to have a part elsewhere?  Run by hand: pytest tests/benchmark/test_remote.py -s"""

import re
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import moddiff
from moddiff import at
from moddiff.hooks import OneRun
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
    def prepare(self, text, image=None): return text
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


def processor_ms(pid):
    """Milliseconds that a process has computed, in all of its threads."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


@torch.no_grad()
def test_a_step_of_a_tiny_run_costs_less_than_a_twentieth_more_elsewhere():
    """In turn, so that both see the same machine, and in processor time, which other programs spoil least.

    What the DiT computes over there it would compute here. So that its own time does not blur what the
    question costs, another DiT answers, which sleeps as long: both processes have gone cold, as in a run.
    """
    pipe = moddiff.load("tiny")
    dit, words = pipe.dit, pipe.text.encode([PROMPT, ""])
    x, t = torch.randn(1, 16, *pipe.latent_shape()), torch.tensor([500.0])
    texts = [dit.prepare([row]) for row in words]
    seconds(lambda: dit(x, t, texts[0]), 10)
    code = ECHO.replace("return x", "time.sleep(0.018); return x").replace("import sys", "import sys, time")
    figures = {name: [] for name in ("step", "alone", "together", "wall")}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            far = moddiff.remote(process.stdout.readline().strip(), "dit")
            run = OneRun()
            prompts = {name: far.prepare([row]) for name, row in zip(("cond", "uncond"), words)}
            for step in range(60):
                begun = time.process_time()
                for text in texts:
                    dit(x, t, text)
                figures["step"].append(1000 * (time.process_time() - begun))
                for name, mark in (("alone", OneRun()), ("together", run)):
                    there, here, wall = processor_ms(process.pid), time.process_time(), time.perf_counter()
                    for branch, prompt in prompts.items():
                        with at(run=mark, step=step, branch=branch):
                            far(x, t, prompt)
                    wall, here = time.perf_counter() - wall, time.process_time() - here
                    figures[name].append(processor_ms(process.pid) - there + 1000 * here)
                figures["wall"].append(1000 * wall - 36)
        finally:
            process.terminate()
    of = {name: statistics.median(values[5:]) for name, values in figures.items()}
    print(
        f"\na step of two branches, processor time: {of['step']:.1f} ms in the DiT; elsewhere, both ends: "
        f"{of['alone']:.2f} ms more as two questions, {of['together']:.2f} as one: "
        f"{100 * of['alone'] / of['step']:.1f} and {100 * of['together'] / of['step']:.1f} %"
        f"\nby the clock {of['wall']:.2f} ms more as one; load {Path('/proc/loadavg').read_text().split()[0]}"
    )
    assert of["together"] < 0.05 * of["step"]


@torch.no_grad()
def test_a_tiny_run_elsewhere():
    """A whole run, by the clock: for a calm machine."""
    pipe = moddiff.load("tiny")
    with command("--roles", "dit") as url:
        far = pipe.replace(dit=moddiff.remote(url, "dit"))
        runs = {"here": pipe, "elsewhere": far}
        films = {name: part(PROMPT, seed=0, steps=2) for name, part in runs.items()}
        assert films["here"] == films["elsewhere"]
        taken = {name: [] for name in runs}
        for _ in range(6):
            for name, part in runs.items():
                taken[name].append(seconds(lambda part=part: list(part.steps(PROMPT, seed=0, steps=12)), 1))
        here, there = (1000 * min(values) for values in taken.values())
    print(f"\n12 steps of the tiny model: {here:.0f} ms here, {there:.0f} ms with the DiT elsewhere", end="")
    print(f": {100 * (there / here - 1):.1f} % more")
