"""Do two programs share a processor?  Two at the same time take at most three times as long as one alone."""

import os
import statistics
import subprocess
import sys

PROMPT = "a red circle moving left on a black background"
ROUNDS = 5
# Generates once for each line that it is sent, and answers with the seconds that it took.
WORKER = f"""
import sys, time
import moddiff, torch
torch.set_num_threads(2)
pipe = moddiff.load("tiny")
pipe({PROMPT!r})
print("warm", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    pipe({PROMPT!r})
    print(time.perf_counter() - start, flush=True)
"""


def start():
    """A worker with two threads, on the first two cores, and with no OpenMP setting but moddiff's own."""
    surroundings = {name: os.environ[name] for name in os.environ if name[:4] not in ("GOMP", "OMP_")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    worker = subprocess.Popen([sys.executable, "-c", WORKER], env=surroundings, **pipes)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(worker.pid, sorted(os.sched_getaffinity(0))[:2])
    return worker


def seconds(*workers):
    """How long a video takes when all workers begin together: the slowest of them, the median of rounds."""
    times = []
    for _ in range(ROUNDS):
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        times.append(max(float(worker.stdout.readline()) for worker in workers))
    return statistics.median(times)


def test_two_at_once_take_at_most_three_times_as_long_as_one_alone():
    workers = [start(), start()]
    try:
        for worker in workers:
            assert worker.stdout.readline() == "warm\n"
        alone, together = seconds(workers[0]), seconds(*workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    print(f"alone {alone:.2f} s, two at once {together:.2f} s: {together / alone:.2f} times as long")
    assert together < 3 * alone
