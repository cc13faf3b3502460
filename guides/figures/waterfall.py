"""One run in three processes, as the guides on telemetry and remote show it: here, its text encoder, its DiT.

    python guides/figures/waterfall.py [FILE]

It writes waterfall.png. The servers run on this machine, so both wait for the same processors.
"""

import re
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import moddiff
from moddiff.telemetry import read, recorded
from moddiff.viz import png, waterfall

PROMPT = "a red circle moving left on a black background"


@contextmanager
def serving(roles, trace):
    """The address of a server of these roles, which leaves its spans in a file when the block ends."""
    command = [sys.executable, "-m", "moddiff", "serve", "--roles", roles, "--port", "0", "--trace", trace]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def spans_of_a_run(folder, steps=6):
    """The spans of all three processes, of one run."""
    pipe, (text, dit) = moddiff.load("tiny"), [folder / f"{role}.json" for role in ("text", "dit")]
    with serving("text", text) as text_url, serving("dit", dit) as dit_url:
        far = pipe.replace(text=moddiff.remote(text_url, "text"), dit=moddiff.remote(dit_url, "dit"))
        far(PROMPT, seed=0, steps=1)  # the first run takes longer
        with recorded() as here:
            far(PROMPT, seed=0, steps=steps)
    return [span for span in (*here, *read(text), *read(dit)) if span.trace == here[0].trace]


def main(file=None):
    file = file or Path(__file__).with_name("waterfall.png")
    with tempfile.TemporaryDirectory() as folder:
        Path(file).write_bytes(png(waterfall(spans_of_a_run(Path(folder)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
