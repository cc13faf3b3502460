"""How long does it take?  A sentence to a video, part by part; and the full-size parts beside Diffusers'.

Speed depends on the machine and on who else uses it; a ratio of two programs that take turns in one process
hardly does. So everything that is said about Diffusers is a ratio, the median over the turns.
goals.py says what each is meant to be.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity

from . import goals, weights
from .extensions import compiled
from .hooks import in_words
from .video import write_whole
from .weights.dialects import FIELDS

PROMPT = "a red circle moving left on a black background"
WORDS = 20  # tokens of a usual prompt; Diffusers pads it to the 512 that Wan was trained with


@dataclass(frozen=True)
class Work:
    """What is run side by side: the parts of a release, with changes to their configs, and the videos."""

    release: str = "wan2.1-t2v-1.3b"
    changes: dict = field(default_factory=dict)  # as {"dit": {"num_layers": 2}}
    size: tuple = (480, 832)
    frames: int = 81
    vae_size: tuple = (480, 832)
    vae_frames: int = 81

    def config(self, kind):
        config = weights.open_release(self.release).parts[kind].config
        return replace(config, **self.changes.get(kind, {}))


ON_A_GPU = Work()
# A few layers at full width, and a video of 3,120 tokens.
FEW = dict(dit=dict(num_layers=2), text=dict(num_layers=2))
ON_A_CPU = Work(changes=FEW, frames=5, vae_size=(64, 96), vae_frames=5)


def main(model="tiny-t2v", runs=3, against=None, only="", device="cpu", output=None):
    """`moddiff bench`: measure, print, and write to `output` as JSON, if that is given."""
    if runs < 1:
        raise ValueError(f"runs={runs}; expected 1 or more")
    if against not in (None, "diffusers"):
        raise ValueError(f"--against {against}; expected diffusers, the only other program we compare with")
    if against is None:
        figures = measure(model, runs)
        keep(figures, output)
        print(json.dumps(figures, indent=2))
        return
    figures = dict(machine=machine(), device=device, rows=[])
    print(f"{'seconds a run':26} {'ours':>9} {'theirs':>9} {'ratio':>7}   peak memory, ours / theirs")
    for row in against_diffusers(device, runs, only):
        figures["rows"].append(row)
        keep(figures, output)
        print(line(row), flush=True)
    if torch.device(device).type == "cpu":
        figures["rows"] += [] if only else [goals.taps_row(), goals.import_row(runs)]
        keep(figures, output)
        print(f"\n{'goal':26} {'figure':14} {'':>8} {'measured':>9}", *goals.lines(figures["rows"]), sep="\n")


def keep(figures, output):
    """Write them to that file, if there is one: before they are printed, and after each row."""
    if output is not None:
        write_whole(output, json.dumps(figures, indent=2).encode() + b"\n")


# A sentence to a video.


def measure(model="tiny-t2v", runs=3):
    """Seconds from a sentence to a video, and of each part.   model: as for moddiff.load -> plain data"""
    pipe = weights.load(model)
    if pipe.task not in ("t2v", "ti2v"):
        raise ValueError(
            f"{pipe.name} is a {pipe.task} model; the bench gives a sentence only. Choose a text-to-video one"
        )
    return dict(
        model=pipe.name,
        machine=machine(),
        prompt=PROMPT,
        **{name: pipe.defaults[name] for name in ("steps", "solver", "frames", "size")},
        seconds=dict(
            first=timed(lambda: pipe(PROMPT), 1),
            warm=timed(lambda: pipe(PROMPT).encode(".mp4"), runs),
            cold_process=cold(model),
        ),
        parts=parts(pipe, runs),
    )


def machine():
    """What the figures depend on."""
    return dict(
        processor=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def cold(model):
    """Seconds of `moddiff generate` in a fresh process, file included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moddiff", "generate", PROMPT, "--model", str(model), "--quiet"]
        command += ["-o", str(Path(folder) / "out.mp4")]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True), 1)


@torch.no_grad()
def parts(pipe, runs):
    """Seconds of each component's share of one video."""
    run = pipe.prepare(PROMPT)
    t = torch.tensor([500], device=run.noise.device)
    latent = run.noise[:, : pipe.channels]
    video = pipe.decode(latent)
    return dict(
        prepare=timed(lambda: pipe.prepare(PROMPT), runs),
        text=timed(lambda: pipe.text.encode([PROMPT]), runs),
        dit_forward=timed(lambda: pipe.dit(run.noise, t, run.context["cond"]), runs),
        solver_step=timed(lambda: run.solver.step(run.noise, run.noise, *run.schedule.sigmas[:2]), runs),
        vae_decode=timed(lambda: pipe.vae.decode(latent), runs),
        mp4=timed(lambda: video.encode(".mp4"), runs),
    )


# Beside Diffusers: the same random weights and inputs, in turn.


def against_diffusers(device="cpu", runs=3, only="", work=None):
    """Each part beside Diffusers' (UMT5: transformers').   -> a dict for each row, as soon as it is measured

    device  "cpu", "cuda", "cuda:1"
    runs    turns that each side gets; the median counts
    only    "dit", "vae" or "text"; "" for all
    work    a Work; by default what the device does in a few minutes

    Raises ImportError where the other program is not installed.
    """
    kinds = dict(dit=dit_rows, vae=vae_rows, text=text_rows)
    if only and only not in kinds:
        raise ValueError(f"only={only!r}; expected one of {', '.join(kinds)}")
    default, dtypes = ON_A_GPU, [torch.bfloat16]
    if torch.device(device).type == "cpu":
        default, dtypes = ON_A_CPU, [torch.float32]
        if bfloat16_is_fast():
            dtypes.append(torch.bfloat16)
    for kind in [only] if only else kinds:
        for dtype in dtypes:
            yield from kinds[kind](work or default, dtype, device, runs)


@torch.no_grad()
def dit_rows(work, dtype, device, runs):
    """One denoising step, eager, and compiled block by block."""
    from diffusers import WanTransformer3DModel

    config = work.config("dit")
    fields = foreign_fields("dit", config) | dict(attention_head_dim=config.dim // config.num_heads)
    theirs = fresh(WanTransformer3DModel, fields, dtype, device)
    ours = weights.build("dit", config, theirs.state_dict())
    for name, weight in theirs.named_parameters():
        if any(part in name for part in theirs._keep_in_fp32_modules):
            weight.data = weight.data.float()  # as from_pretrained leaves them
    x = torch.randn(ours.example(work.size, work.frames)[0].shape, device=device)
    t = torch.tensor([500], device=device)
    words = torch.randn(WORDS, config.text_dim, device=device, dtype=dtype)
    padded = F.pad(words, (0, 0, 0, config.text_len - WORDS))[None]  # [1, text_len, text_dim]
    context = ours.prepare([words])  # keys and values: ours are made once a prompt, theirs in every step

    theirs_in = dict(hidden_states=x.to(dtype), timestep=t, encoder_hidden_states=padded, return_dict=False)
    their_step = partial(theirs, **theirs_in)
    row = side_by_side("dit, eager", partial(ours, x, t, context), their_step, dtype, device, runs)
    if torch.device(device).type == "cpu":
        tokens = x[0, 0].numel() // math.prod(config.patch_size)
        step = partial(ours, x, t, context)
        row["of_products"] = goals.of_products(step, config, tokens, WORDS, dtype, runs)
    yield row
    theirs.compile_repeated_blocks()  # block by block as well
    fused = partial(compiled(ours), x, t, context)
    yield side_by_side("dit, compiled", fused, their_step, dtype, device, runs)


@torch.no_grad()
def vae_rows(work, dtype, device, runs):
    """A whole video, decoded."""
    from diffusers import AutoencoderKLWan

    config = work.config("vae")
    theirs = fresh(AutoencoderKLWan, foreign_fields("vae", config), dtype, device)
    ours = weights.build("vae", config, theirs.state_dict())
    time, height, width = config.stride
    cells = (work.vae_frames - 1) // time + 1, work.vae_size[0] // height, work.vae_size[1] // width
    latent = torch.randn(1, config.z_dim, *cells, device=device, dtype=dtype)
    mean, std = (latent.new_tensor(value)[:, None, None, None] for value in (config.mean, config.std))

    pair = partial(ours.decode, latent), partial(theirs.decode, latent * std + mean, return_dict=False)
    yield side_by_side("vae, decode", *pair, dtype, device, runs)


@torch.no_grad()
def text_rows(work, dtype, device, runs):
    """One prompt of 20 tokens. Theirs is padded to text_len and masked, as Diffusers' pipeline wants it."""
    from transformers import UMT5Config, UMT5EncoderModel

    # Few pieces: a row of their table is only looked up, and all 256,384 take 4 GB.
    config = replace(work.config("text"), vocab=1000)
    fields = foreign_fields("text", config) | dict(d_kv=config.dim_attn // config.num_heads)
    theirs = fresh(UMT5EncoderModel, dict(config=UMT5Config(**fields)), dtype, device)
    ours = weights.build("text", config, theirs.state_dict())
    ids = torch.randint(2, config.vocab, (1, WORDS), device=device)
    padded = F.pad(ids, (0, config.text_len - WORDS))
    mask = (torch.arange(config.text_len, device=device) < WORDS)[None].long()

    pair = partial(ours, ids), partial(theirs, padded, mask, return_dict=False)
    yield side_by_side("text, 20 tokens", *pair, dtype, device, runs)


def foreign_fields(kind, config):
    """A config of ours as the fields that Diffusers' (transformers') class of that kind takes."""
    same = {theirs: ours for theirs, ours in FIELDS[kind].items() if isinstance(ours, str)}
    fields = {theirs: getattr(config, ours) for theirs, ours in same.items() if "vace" not in ours}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
        if value is not None
    }


def fresh(module, fields, dtype, device):
    """Their module, with random weights."""
    with torch.device(device):
        theirs = module(**fields)
    return nn.Module.to(theirs, dtype).eval()  # their own `to` warns of what is mended in dit_rows


def side_by_side(name, ours, theirs, dtype, device, runs):
    """Two functions of equal work, called in turn.   -> a row of the table

    Seconds are medians; `ratio` is the median over the turns, `peak` the bytes held above the weights, and
    `difference` the largest one between the two results, as a share of the largest value.
    """
    mine, other = ours(), theirs()[0]  # also compiles, and chooses kernels
    other = other[:, : mine.shape[1]]  # without the rows of padding that their text has
    turns = [(timed(ours, 1, device), timed(theirs, 1, device)) for _ in range(runs)]
    peak, their_peak = peak_bytes(ours, device), peak_bytes(theirs, device)
    return dict(
        name=f"{name}, {str(dtype).removeprefix('torch.')}",
        difference=float((mine - other).abs().max() / other.abs().max()),
        peak=peak,
        their_peak=their_peak,
        ours=statistics.median(a for a, _ in turns),
        theirs=statistics.median(b for _, b in turns),
        ratio=statistics.median(a / b for a, b in turns),
        peak_ratio=peak / their_peak,
    )


def line(row):
    """A row as one line of the table."""
    peaks = f"{in_words(row['peak'])} / {in_words(row['their_peak'])}"
    return f"{row['name']:26} {row['ours']:9.4f} {row['theirs']:9.4f} {row['ratio']:7.2f}   {peaks}"


def timed(work, runs, device="cpu"):
    """Median seconds of calling work()."""
    times = []
    for _ in range(runs):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device):
    """Let a GPU, which works on its own time, come to an end."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work, device):
    """The most that work() held at once, above what there was before: torch's allocator counts it.

    What libraries allocate for themselves (oneDNN's scratch space on a CPU) is not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and stop
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held, default=0)


def bfloat16_is_fast():
    """Does this CPU multiply matrices faster in bfloat16 than in float32?"""
    x = torch.randn(1024, 1024)
    half = x.bfloat16()
    return timed(lambda: half @ half, 9) < timed(lambda: x @ x, 9)
