"""How were the tiny models trained?  Stages, each resumable, seeded and logged: vae, text, clip, t2v, decoder, i2v.

    moddiff train-tiny --stage vae

Every stage writes `<folder>/<stage>/`: `checkpoint.pt` (all that a resumed run needs), `log.csv`, and the averaged weights that
`moddiff train-tiny --export` copies into the package. Data of step n depend on (seed, n) alone, so a resumed run sees what an
unbroken one would have seen. With `--workers 2` two processes of one thread each train one model, each on a batch of its own: on a CPU
that is faster than one process with two threads.
"""

import csv
import json
import math
import os
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .muon import optimisers

CHECKPOINT_SECONDS = 120


def learning_rate(step, steps, warmup=50, decay=0.4):
    """Factor on the learning rate: a linear rise, a plateau, and a linear fall over the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def replace_file(path, write):
    """write(temporary path), then move it into place: readers see the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def average_gradients(model):
    """Replace every gradient by its mean over the processes that train this model."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, mean in zip(gradients, (flat / dist.get_world_size()).split([g.numel() for g in gradients])):
        g.copy_(mean.view_as(g))


def train(stage, folder, steps, seed=0, resume=True):
    """Run `stage` up to `steps`, from its checkpoint if there is one, else from `start.safetensors` if that is there.   -> the averaged (EMA) model

    stage   an object with name, model, muon_lr, adam_lr, embeddings, ema, loss(step, rng) -> (loss, {figure: value}), evaluate(model) -> {}
    folder  where `<stage>/checkpoint.pt`, `log.csv` and `ema.safetensors` go
    """
    folder = Path(folder) / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    model, ema = stage.model.train(), deepcopy(stage.model).eval().requires_grad_(False)
    optims = optimisers(model, stage.muon_lr, stage.adam_lr, stage.embeddings)
    rates = [group["lr"] for optim in optims for group in optim.param_groups]
    start, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optim, state in zip(optims, saved["optims"]):
            optim.load_state_dict(state)
        start, seconds = saved["step"], saved["seconds"]
    elif (folder / "start.safetensors").exists():
        for each in (model, ema):
            each.load_state_dict(load_file(folder / "start.safetensors"))

    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def save(step):
        state = dict(
            model=model.state_dict(),
            ema=ema.state_dict(),
            optims=[o.state_dict() for o in optims],
            step=step,
            seconds=seconds,
        )
        replace_file(checkpoint, lambda path: torch.save(state, path))
        replace_file(folder / "ema.safetensors", lambda path: save_file(ema.state_dict(), path))

    tick, last_save, last_log, recent = time.monotonic(), time.monotonic(), time.monotonic(), []
    progress = tqdm(
        range(start, steps), initial=start, total=steps, desc=stage.name, mininterval=10, disable=rank > 0
    )
    for step in progress:
        factor = learning_rate(step, steps)
        for group, rate in zip((g for o in optims for g in o.param_groups), rates):
            group["lr"] = rate * factor
        loss, figures = stage.loss(
            step, np.random.default_rng([seed, step] if workers == 1 else [seed, step, rank])
        )
        loss.backward()
        if workers > 1:
            average_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"{stage.name}: the gradient at step {step} is not finite; resume from {checkpoint.name} with a lower rate"
            )
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        keep = min(stage.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, p in zip(ema.parameters(), model.parameters()):
                average.lerp_(p, 1 - keep)
        if rank > 0:
            continue
        recent.append(dict(loss=float(loss.detach()), **figures))
        now = time.monotonic()
        seconds, tick = seconds + now - tick, now
        if now - last_log > 15 or step + 1 == steps:
            means = {key: float(np.mean([r[key] for r in recent if key in r])) for r in recent for key in r}
            means = dict(
                step=step + 1, seconds=round(seconds), **{key: round(v, 5) for key, v in means.items()}
            )
            append_row(folder / "log.csv", means)
            progress.set_postfix({k: v for k, v in means.items() if k != "step"})
            recent, last_log = [], now
        if now - last_save > CHECKPOINT_SECONDS or step + 1 == steps:
            save(step + 1)
            last_save = time.monotonic()
    return ema


def append_row(path, row):
    """Add one line to a CSV of (step, seconds, figure, value), so that figures may come and go."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "seconds", "figure", "value"])
        writer.writerows(
            [row["step"], row["seconds"], key, value]
            for key, value in row.items()
            if key not in ("step", "seconds")
        )


STEPS = dict(
    vae=1200, text=650, t2v=5900, decoder=2180, clip=350, i2v=1700
)  # about what the shipped weights were given, in batches of 32; see CARD.md
CLIPS = 8000  # how many clips t2v and i2v learn from


def run_stage(name, steps=None, folder="runs", seed=0, clips=CLIPS, workers=1):
    """Train one stage to `steps` in `folder`, from where it was left; the stages before it must have run there.

    name     "vae", "text", "clip", "t2v" (which caches its latents first), "decoder" (on the same latents) or "i2v"
    workers  how many processes train it together; more than 1: with one thread and a batch each, gradients averaged
    """
    folder = Path(folder)
    if name not in STEPS:
        raise ValueError(f"stage {name!r} is not one of {', '.join(STEPS)}")
    steps = STEPS[name] if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps = {steps}; expected 1 or more")
    if workers < 1:
        raise ValueError(f"workers = {workers}; expected 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    stage = make_stage(name, folder, seed, clips)
    if workers == 1:
        return train(stage, folder, steps, seed)
    together(_work, workers, name, steps, folder, seed, clips)


def together(work, workers, *arguments):
    """Run `work(*arguments)` in several processes of one thread each that can average what they learn; a process that fails stops them all."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # where the processes find one another
    torch.multiprocessing.spawn(_join, (workers, store.port, work, arguments), workers)


def _join(rank, workers, port, work, arguments):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the processes are all on this machine
    dist.init_process_group(
        "gloo", store=dist.TCPStore("127.0.0.1", port, is_master=False), rank=rank, world_size=workers
    )
    try:
        work(*arguments)
        dist.barrier()  # nobody leaves while another still listens
    finally:
        dist.destroy_process_group()


def _work(name, steps, folder, seed, clips):
    train(make_stage(name, folder, seed, clips), folder, steps, seed)


def make_stage(name, folder, seed=0, clips=CLIPS):
    """The stage `name` with its model and data; what it needs first (tokenizer, cached latents) is made if it is not in `folder` yet."""
    from . import stages

    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        replace_file(tokenizer, stages.train_tokenizer)
    if name == "vae":
        return stages.VAEStage(seed=seed)
    if name == "text":
        return stages.TextStage(tokenizer, seed=seed)
    if name == "clip":
        return stages.CLIPStage(tokenizer, seed=seed)
    vae = stages.load_vae(folder)
    stages.cache_latents(vae, folder / "clips", clips)
    if name == "decoder":
        return stages.DecoderStage(vae, folder / "clips", stages.towers(folder, tokenizer), seed=seed)
    if name == "t2v":
        return stages.T2VStage(tokenizer, folder / "clips", stages.part(folder, "text", "text"), seed=seed)
    stages.cache_latents(vae, folder / "firsts", clips, what="first")
    return stages.I2VStage(
        *stages.frozen_towers(folder, tokenizer),
        stages.part(folder, "t2v", "dit"),
        folder / "clips",
        folder / "firsts",
        seed=seed,
    )


PARTS = {  # file of the package: (stage it comes from, model of that stage, preset entry)
    "vae": ("decoder", None, "vae"),
    "text": ("t2v", "text", "text"),
    "t2v": ("t2v", "dit", "dit"),
    "image": ("clip", "image", "image"),
    "i2v": ("i2v", "dit", "dit"),
}
PRESETS = {
    "tiny-t2v": ("text to video", ("vae", "text", "t2v")),
    "tiny-i2v": ("image to video", ("vae", "text", "image", "i2v")),
}
SAMPLING = dict(
    solver="unipc",
    steps=20,
    shift=5.0,
    scale=4.0,
    frames=17,
    fps=8,
    size=[96, 96],
    sizes=[[96, 96]],
    fit="crop",
)


def begin_from_shipped(folder, package=Path(__file__).parents[1]):
    """Lay the package's weights into an empty `folder` as stages that have run, so that any of them can go on from there.   -> [stage names]

    Each gets `ema.safetensors`, for the stages after it, and `start.safetensors`, from which `train` begins. What training threw away (the
    text stage's questions, clip's text tower) is not shipped: those two stages can be built upon but not gone on with.
    """
    folder, shipped = Path(folder), Path(package) / "tiny" / "weights"
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty; give a new folder, or go on with what is in it by leaving out --from-shipped"
        )
    missing = [
        file
        for file in (*(f"{name}.safetensors" for name in PARTS), "tokenizer.json")
        if not (shipped / file).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} not in tiny/weights: the package carries no such trained weights to begin from"
        )
    read = lambda name, prefix="": {
        prefix + key: value.float() for key, value in load_file(shipped / f"{name}.safetensors").items()
    }
    text, vae = read("text", "text."), read("vae")
    states = dict(
        vae=vae,
        decoder=vae,
        text=text,
        t2v=text | read("t2v", "dit."),
        clip=read("image", "image."),
        i2v=read("i2v", "dit."),
    )
    for stage, state in states.items():
        (folder / stage).mkdir(parents=True)
        for file in ("ema", "start") if stage not in ("text", "clip") else ("ema",):
            save_file(state, folder / stage / f"{file}.safetensors")
    with safe_open(shipped / "vae.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    (folder / "vae" / "statistics.json").write_text(json.dumps(dict(mean=config["mean"], std=config["std"])))
    (folder / "tokenizer.json").write_bytes((shipped / "tokenizer.json").read_bytes())
    return list(states)


def export(folder, package=Path(__file__).parents[1]):
    """Copy the averaged weights, in half precision, and a preset for each complete model to where `moddiff.load` finds them.   -> [file names]"""
    from . import stages

    folder, package, written = Path(folder), Path(package), []
    configs = {
        name: stages.config_of(name, folder)
        for name, (stage, _, _) in PARTS.items()
        if (folder / stage / "ema.safetensors").exists()
    }
    for name, config in configs.items():
        stage, model, _ = PARTS[name]
        state = {key: value.half() for key, value in stages.part(folder, stage, model).items()}
        metadata = dict(config=json.dumps(config), format="pt")
        replace_file(
            package / "tiny" / "weights" / f"{name}.safetensors",
            lambda path: save_file(state, path, metadata=metadata),
        )
        written.append(f"tiny/weights/{name}.safetensors")
    replace_file(
        package / "tiny" / "weights" / "tokenizer.json",
        lambda path: path.write_bytes((folder / "tokenizer.json").read_bytes()),
    )
    for preset, (task, names) in PRESETS.items():
        if set(names) <= set(configs):
            entry = dict(
                name=preset,
                about=f"The tiny world's own Wan, {task}: trained for this package, see tiny/CARD.md",
                task="i2v" if "i2v" in names else "t2v",
                dtype="fp32",
            )
            entry |= {PARTS[name][2]: configs[name] for name in names}
            files = {PARTS[name][2]: f"{name}.safetensors" for name in names}
            entry |= dict(
                sampling=SAMPLING,
                negative="",
                weights=dict(folder="tiny/weights", tokenizer="tokenizer.json", **files),
            )
            replace_file(
                package / "weights" / "presets" / f"{preset}.json",
                lambda path: path.write_text(json.dumps(entry, indent=2, ensure_ascii=False) + "\n"),
            )
            written.append(f"weights/presets/{preset}.json")
    return written
