"""Does moddiff do on an accelerator what it does on a CPU, and is it as fast and as small there as we say?

    python tests/benchmark/accelerator.py -o guides/figures/accelerator.json
    python tests/benchmark/accelerator.py --device cpu --small      # does the script itself run to its end?

Random weights; nothing is downloaded. Not collected by pytest: the machines that test every commit have no
accelerator. "by block", "step caches" and "few pairs" have not run on one yet, only with --small. The file is
written after each section, so that a run that is cut short leaves what it measured.
An exception ends its own section, is kept in the file, and makes the exit status 1.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from parallel import started as in_processes
from safetensors import safe_open

import moddiff
from moddiff import bench, goals, weights
from moddiff.attention import attend
from moddiff.extensions import cached, compiled, offloaded, quantized, sparse
from moddiff.hooks import OneRun, at, capture, patch, zero
from moddiff.pipeline import Pipeline
from moddiff.text import Tokenizer
from moddiff.tiny import score, targets
from moddiff.weights import configs
from moddiff.weights.fit import forecast
from moddiff.weights.working import text_bytes

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENIZER = Path(moddiff.__file__).parent / "tiny" / "weights" / "tokenizer.json"
PROMPT = bench.PROMPT
GB = 1e9
SIZES = {  # release: (size, frames) of its own default
    "wan2.1-t2v-1.3b": ((480, 832), 81),
    "wan2.2-ti2v-5b": ((704, 1280), 121),
    "wan2.1-t2v-14b": ((720, 1280), 81),
}
# With --small: the same releases and work, on parts that a laptop runs in seconds.
SMALL = dict(
    dit=dict(dim=64, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32),
    text=dict(vocab=1000, dim=32, dim_attn=32, dim_ffn=48, num_heads=2, num_layers=2),
    vae=dict(dim=8, num_res_blocks=1),
)
SMALL_SIZE = (64, 64), 5


class Wan:
    """One release at the size that is measured: the sizes of its parts and of its video."""

    def __init__(self, name, small):
        release = weights.open_release(name)
        self.name, self.task, self.defaults = name, release.task, release.sampling
        self.changes = SMALL if small else {}
        self.size, self.frames = SMALL_SIZE if small else SIZES[name]
        self.configs = {
            kind: replace(part.config, **self.changes.get(kind, {})) for kind, part in release.parts.items()
        }

    def forecast(self, **how):
        return forecast(self.configs, self.size, self.frames, **how)

    def bench(self, **more):
        """The work of `moddiff bench --against diffusers`, at this size."""
        videos = dict(size=self.size, frames=self.frames, vae_size=self.size, vae_frames=self.frames)
        changes = {kind: self.changes.get(kind, {}) | more.get(kind, {}) for kind in ("dit", "text", "vae")}
        return bench.Work(self.name, changes, **videos)


# ---- equal to a CPU? -----------------------------------------------------------------------------


def kernels(device):
    """Largest difference of each attention kernel from float64 on the CPU, heads of 64 and of Wan's 128."""
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        for width in (64, 128):
            source = torch.Generator().manual_seed(0)
            qkv = [torch.randn(2, 3, n, width, generator=source).to(dtype) for n in (257, 515, 515)]
            bias = torch.randn(3, 257, 515, generator=source)
            for words, added in (("no bias", None), ("bias", bias)):
                exact = attend(*(x.double() for x in qkv), bias=to(added, torch.float64), kernel="math")
                for name in ("math", "sdpa", "flex"):
                    ours = attend(*(x.to(device) for x in qkv), bias=to(added, device), kernel=name)
                    figures[f"{name}, {name_of(dtype)}, {width}, {words}"] = distance(ours, exact)
    return figures


def goldens(device):
    """Largest difference of every component, in float32 without TF32, from the official code on a CPU."""
    figures, tf32 = {}, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    for name, (kind, pairs) in GOLDEN_PARTS.items():
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
            tensors = {each: file.get_tensor(each) for each in file.keys()}
            config = json.loads(file.metadata()["config"])
        stored = {each: x for each, x in tensors.items() if each.startswith("weight.")}
        seen = {each: x.to(device) for each, x in tensors.items() if each not in stored}
        state = {each.removeprefix("weight."): x for each, x in stored.items()}
        module = weights.build(kind, config, state).to(device)
        figures[name] = max(distance(ours, official) for ours, official in pairs(module, seen))
    torch.backends.cudnn.allow_tf32 = tf32
    return figures


def text_pairs(text, seen):
    mask = seen["in.mask"]
    yield text(seen["in.ids"], mask) * mask[..., None], seen["out.hidden"] * mask[..., None]


def image_pairs(image, seen):
    features = [image.encode(seen[f"in.video{i}"].transpose(0, 1)) for i in (0, 1)]
    yield torch.cat(features), seen["out.features"]


def vae_pairs(vae, seen):
    for chunked in (False, True):
        yield vae.encode(seen["in.video"], chunked), seen["out.mu_normalized"]
        yield vae.decode(seen["in.z"], chunked), seen["out.video"]


def dit_pairs(dit, seen):
    text = [seen["in.context0"], seen["in.context1"]]
    more = dict(image=seen.get("in.clip_fea"), y=seen.get("in.y"))
    yield dit(seen["in.x"], seen["in.t"], text, **more), seen["out.v"]


GOLDEN_PARTS = {
    "t5_encoder": ("text", text_pairs),
    "clip_visual": ("image", image_pairs),
    "dit_t2v": ("dit", dit_pairs),
    "dit_i2v": ("dit", dit_pairs),
    "dit_flf2v": ("dit", dit_pairs),
    "dit_ti2v": ("dit", dit_pairs),
    "vae2_1": ("vae", vae_pairs),
    "vae2_2": ("vae", vae_pairs),
}


def tiny(device, number):
    """The shipped models: how many held-out prompts are right, is a run repeated to the bit, how fast."""
    figures = {}
    for dtype in ("fp32", "bf16"):
        pipe = moddiff.load("tiny-t2v", dtype=dtype, device=device)
        verdicts = targets.t2v(pipe, 1, number)
        first, second = (pipe(PROMPT, seed=3).frames for _ in range(2))
        figures[dtype] = dict(
            right=score.summarise(verdicts)["all"],
            repeats_to_the_bit=bool((first == second).all()),
            warm_seconds=targets.seconds(pipe),
        )
    picture = pipe(PROMPT, seed=3).frames[0]
    i2v = moddiff.load("tiny-i2v", device=device)(PROMPT, image=picture, seed=0)
    figures["i2v_first_frame_psnr"] = float(score.psnr(picture, i2v.frames[0]))
    return figures


def looking(device):
    """Capture and patch there: nothing changes that should not, and everything is put back."""
    pipe = moddiff.load("tiny-t2v", device=device)
    plain = pipe(PROMPT, seed=1).frames
    with capture(pipe, "dit.blocks.*.cross_attn.probs", steps=[0, 5], device="cpu") as seen:
        captured = pipe(PROMPT, seed=1).frames
    with patch(pipe, "dit.blocks.*.cross_attn.out", zero()):
        patched = pipe(PROMPT, seed=1).frames
    again = pipe(PROMPT, seed=1).frames
    return dict(
        taps_kept=len(list(seen)),
        kept_on=str(next(iter(seen))[1].device),
        probabilities_change_the_last_bits_only=int(abs(captured.astype(int) - plain).max()),
        patch_changes_the_video=bool((patched != plain).any()),
        restored_to_the_bit=bool((again == plain).all()),
    )


def tiny_compiled(device):
    """torch.compile over the tiny DiT: the difference, and a session on the compiled model."""
    dit = moddiff.load("tiny-t2v", device=device).dit
    x, t = torch.randn(1, 16, 5, 12, 12, device=device), torch.tensor([500.0], device=device)
    text = dit.prepare([torch.randn(12, dit.config.text_dim, device=device)])
    plain = dit(x, t, text)
    fast = torch.compile(dit)
    difference = distance(fast(x, t, text), plain)
    with capture(fast, "blocks.0.resid_post") as seen:
        fast(x, t, text)
    return dict(
        difference=difference,
        captured=len(list(seen)),
        eager_ms=1e3 * bench.timed(lambda: dit(x, t, text), 20, device),
        compiled_ms=1e3 * bench.timed(lambda: fast(x, t, text), 20, device),
    )


# ---- as fast and as small as forecast? -----------------------------------------------------------


def big_dit(wan, device):
    """One pass of a DiT of real size in bfloat16, beside the forecast of `moddiff inspect`."""
    config = wan.configs["dit"]
    dit = random("dit", config, torch.bfloat16, device)
    x, t, *_ = dit.example(size=wan.size, frames=wan.frames)
    x = torch.randn(x.shape, device=device)
    text = dit.prepare([torch.randn(512, config.text_dim, device=device, dtype=torch.bfloat16)])
    cast = wan.forecast(widths={"vae": 4})
    # Wan 2.2's ti2v has a time for each token.
    t = torch.full((1, cast["tokens"]) if config.model_type == "ti2v" else (1,), 500.0, device=device)
    dit(x, t, text)  # loads the kernels
    seconds = bench.timed(lambda: dit(x, t, text), 2, device)
    working = bench.peak_bytes(lambda: dit(x, t, text), device)
    return dict(
        size=list(wan.size),
        frames=wan.frames,
        tokens=cast["tokens"],
        seconds=seconds,
        tflops_a_second=goals.step_flops(config, cast["tokens"]) / seconds / 1e12,
        weights_gb=bytes_of(dit) / GB,
        forecast_weights_gb=cast["parts"]["dit"]["weights"] / GB,
        working_gb=working / GB,
        forecast_working_gb=cast["parts"]["dit"]["working"] / GB,
    )


def streamed(wan, device):
    """A pass of 14B at 480p with some of its blocks on the card, and what it holds.   {keep: ...}"""
    size, frames = SMALL_SIZE if wan.changes else SIZES["wan2.1-t2v-1.3b"]
    dit = random("dit", wan.configs["dit"], torch.bfloat16, "cpu")
    x, t, *_ = dit.example(size=size, frames=frames)
    x, t = torch.randn(x.shape, device=device), torch.full((1,), 500.0, device=device)
    text = [torch.randn(512, dit.config.text_dim, device=device, dtype=torch.bfloat16)]
    layers = dit.config.num_layers
    ways = ((0, 0), (0, 1), (layers // 4, 1), (layers // 2, 1), (layers, 1))

    def measure(keep, ahead):
        part = offloaded(dit, device=device, keep=keep, ahead=ahead)
        work = partial(part, x, t, part.prepare(text))
        work()
        return dict(seconds=bench.timed(work, 2, device), working_gb=bench.peak_bytes(work, device) / GB)

    return {f"keep {keep}, ahead {ahead}": measure(keep, ahead) for keep, ahead in ways}


def few_bits(wan, device):
    """A pass of the DiT with its weights in fewer bits, beside bfloat16: time, bytes, difference."""
    dit = random("dit", wan.configs["dit"], torch.bfloat16, device)
    x, t, *_ = dit.example(size=wan.size, frames=wan.frames)
    x, t = torch.randn(x.shape, device=device), torch.full((1,), 500.0, device=device)
    text = [torch.randn(512, dit.config.text_dim, device=device, dtype=torch.bfloat16)]
    plain = dit(x, t, text)

    def measure(kind):
        part = dit if kind is None else quantized(dit, kind)
        work = partial(part, x, t, part.prepare(text))
        difference = (work() - plain).square().mean() / plain.square().mean()
        return dict(
            seconds=bench.timed(work, 2, device),
            weights_gb=bytes_of(part) / GB,
            difference=float(difference.sqrt()),
        )

    kinds = (None, "fp8-dynamic", "fp8", "int8-dynamic", "int8", "q8_0", "q4_0")
    return {kind or "bfloat16": measure(kind) for kind in kinds}


def few_pairs(wan, device):
    """A pass of the DiT whose tokens listen to fewer others, by flex attention, beside all pairs.

    Its difference is that to the same pairs by a mask.
    """
    dit = random("dit", wan.configs["dit"], torch.bfloat16, device)
    x, t, *_ = dit.example(size=wan.size, frames=wan.frames)
    x, t = torch.randn(x.shape, device=device), torch.full((1,), 500.0, device=device)
    text = dit.prepare([torch.randn(512, dit.config.text_dim, device=device, dtype=torch.bfloat16)])
    figures = {"all pairs": dict(seconds=bench.timed(partial(dit, x, t, text), 2, device))}
    for pattern, how in (("sliding", {"time": 4, "space": None}), ("radial", {}), ("radial", {"decay": 0.2})):
        part = sparse(dit, pattern, **how)
        masked = part(x, t, text)
        part.use_kernel("flex")
        difference = distance(part(x, t, text), masked)  # also compiles
        seconds = bench.timed(partial(part, x, t, text), 2, device)
        kept = part.report().rows[-1]["kept"]
        figures[repr(part)] = dict(seconds=seconds, kept=kept, difference=difference)
    return figures


def by_block(wan, device):
    """The DiT as it is written and compiled block by block: seconds, and the kernels that take most of it.

    Beside Diffusers' both ways: the section "beside diffusers".
    """
    dit = random("dit", wan.configs["dit"], torch.bfloat16, device)
    x, t, *_ = dit.example(size=wan.size, frames=wan.frames)
    x, t = torch.randn(x.shape, device=device), torch.full((1,), 500.0, device=device)
    text = dit.prepare([torch.randn(512, dit.config.text_dim, device=device, dtype=torch.bfloat16)])
    plain = dit(x, t, text)

    def measure(part):
        start = time.perf_counter()
        difference = distance(part(x, t, text), plain)  # also compiles
        first, work = time.perf_counter() - start, partial(part, x, t, text)
        return dict(
            first=first,
            seconds=bench.timed(work, 3, device),
            working_gb=bench.peak_bytes(work, device) / GB,
            difference=difference,
            kernels=kernels_of(work),
        )

    figures = dict(eager=measure(dit), compiled=measure(compiled(dit)))
    if not wan.changes:  # minutes of trying kernels: not when only the script is tried
        figures["max-autotune"] = measure(compiled(dit, mode="max-autotune-no-cudagraphs"))
    return figures


def kernels_of(work, most=12):
    """{kernel: [calls, milliseconds]} of one call, the dearest first."""
    with torch.profiler.profile() as seen:
        work()
    rows = [(e.self_device_time_total or e.self_cpu_time_total, e.count, e.key) for e in seen.key_averages()]
    return {name[:80]: [count, micro / 1e3] for micro, count, name in sorted(rows, reverse=True)[:most]}


def step_caches(wan, device):
    """Seconds of each of eight steps; the first are computed, the others left out where the policy can."""
    dit = random("dit", wan.configs["dit"], torch.bfloat16, device)
    x, t, *_ = dit.example(size=wan.size, frames=wan.frames)
    x, t = torch.randn(x.shape, device=device), torch.full((1,), 500.0, device=device)
    text = dit.prepare([torch.randn(512, dit.config.text_dim, device=device, dtype=torch.bfloat16)])
    figures = {}
    for policy, how in (("easycache", {"first": 1}), ("first-block", {})):
        # With such a threshold all is left out that the policy may leave out.
        work, taken = partial(cached(dit, policy, threshold=1e9, **how), x, t, text), []
        run = OneRun(torch.linspace(1000, 125, 8).tolist())
        for step in range(8):
            with at(run=run, step=step, branch="cond"):
                taken.append(bench.timed(work, 1, device))
        figures[policy] = taken
    return figures


def big_vae(wan, device, dtype):
    """A whole video in chunks, beside the forecast. torch's own settings: float32 may use TF32 inside."""
    config = wan.configs["vae"]
    vae = random("vae", config, dtype, device)
    time, height, width = config.stride
    cells = (wan.frames - 1) // time + 1, wan.size[0] // height, wan.size[1] // width
    latent = torch.randn(1, config.z_dim, *cells, device=device)
    video = vae.decode(latent, chunked=True)
    decode, encode = partial(vae.decode, latent, chunked=True), partial(vae.encode, video, chunked=True)
    cast = wan.forecast(widths={"vae": dtype.itemsize})
    return dict(
        size=list(wan.size),
        frames=wan.frames,
        forecast_working_gb=cast["parts"]["vae"]["working"] / GB,
        decode_seconds=bench.timed(decode, 1, device),
        decode_working_gb=bench.peak_bytes(decode, device) / GB,
        encode_seconds=bench.timed(encode, 1, device),
        encode_working_gb=bench.peak_bytes(encode, device) / GB,
    )


def big_text(wan, device):
    """One prompt of full length through UMT5-XXL in bfloat16."""
    config = wan.configs["text"]
    text = random("text", config, torch.bfloat16, device)
    ids = torch.randint(2, config.vocab, (1, config.text_len), device=device)
    text(ids)
    return dict(
        seconds=bench.timed(lambda: text(ids), 3, device),
        weights_gb=bytes_of(text) / GB,
        working_gb=bench.peak_bytes(lambda: text(ids), device) / GB,
        forecast_working_gb=text_bytes(config, 2) / GB,
    )


def whole(wan, device):
    """The whole pipeline, every part on the card: four steps of random weights, a capture beside `.cost`."""
    dtypes = dict(vae=torch.float32)
    parts = {
        kind: random(kind, config, dtypes.get(kind, torch.bfloat16), device)
        for kind, config in wan.configs.items()
    }
    parts["text"].tokenizer = Tokenizer(TOKENIZER, 512)
    pipe = Pipeline(**parts, task=wan.task, name=wan.name, defaults=wan.defaults)
    video = dict(size=wan.size, frames=wan.frames)
    start = time.perf_counter()
    working = bench.peak_bytes(lambda: pipe(PROMPT, steps=4, **video), device)
    seconds = time.perf_counter() - start
    place = f"dit.blocks.{wan.configs['dit'].num_layers // 2}.cross_attn.probs"
    session = capture(pipe, place, steps=[1], branch="cond", dtype=torch.float16, device="cpu", limit=None)
    cost = session.cost(**video, words=len(parts["text"].encode([PROMPT])[0])).bytes
    with session as seen:
        pipe(PROMPT, steps=2, **video)
    return dict(
        seconds=seconds,
        steps=4,
        peak_gb=(sum(map(bytes_of, parts.values())) + working) / GB,
        forecast_peak_gb=wan.forecast(widths={"vae": 4})["peak"] / GB,
        captured_bytes=sum(value.nbytes for _, value in seen),
        forecast_captured_bytes=cost,
    )


def ranks(device, small):
    """Passes of 1.3B shared between the GPUs of this machine, by nccl under torchrun; see parallel.py.

    Where there is one GPU, nothing but that is said. On a CPU, with --small, two processes over gloo.
    """
    on_gpu = torch.device(device).type == "cuda"
    here = torch.cuda.device_count() if on_gpu else 2
    size = ("--layers", 1, "--cells", 2, 8, 8) if small else ("--layers", 30, "--cells", 21, 60, 104)
    figures = {"devices": here}
    for world in (1, 2, 4, 8):
        ways = [dict(ulysses=world), dict(ring=world)] if world > 1 else [{}]
        ways += [dict(ulysses=world // 2, ring=2)] if world > 2 else []
        for how in ways if 1 < here >= world else ():
            figures[f"{world}: {how}"] = in_processes(world, how, "--device", device, *size)
    return figures


def random(kind, config, dtype, device):
    """A component of that config with random weights, made on the device."""
    module = configs.empty(kind, config).to(dtype).to_empty(device=device).requires_grad_(False)
    source = torch.Generator(device).manual_seed(0)
    for value in module.parameters():
        value.normal_(0, 0.02, generator=source)
    return module


def bytes_of(module):
    return sum(value.nbytes for value in [*module.parameters(), *module.buffers()])


def distance(ours, exact):
    return float((ours.detach().cpu().double() - exact.detach().cpu().double()).abs().max())


def to(x, where):
    return None if x is None else x.to(where)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---- the sections --------------------------------------------------------------------------------


def sections(device, small):
    """(name, what measures it), in the order in which they run."""
    wan, ti2v, large = (Wan(name, small) for name in SIZES)
    yield "kernels", partial(kernels, device)
    yield "goldens", partial(goldens, device)
    yield "tiny", partial(tiny, device, 2 if small else 32)
    yield "looking", partial(looking, device)
    yield "compiled", partial(tiny_compiled, device)
    yield "beside diffusers", partial(beside, device, wan.bench())
    # A block of 14B at the size of 1.3B: as many tokens, 3.3 times the width.
    block = replace(large.bench(dit=dict(num_layers=1)), size=wan.size, frames=wan.frames)
    yield "beside diffusers, a 14B block", partial(beside, device, block, "dit")
    yield "text, UMT5-XXL", partial(big_text, wan, device)
    for each in (wan, ti2v, large):
        yield f"dit, {each.name}", partial(big_dit, each, device)
    yield f"by block, {wan.name}", partial(by_block, wan, device)
    yield f"step caches, {wan.name}", partial(step_caches, wan, device)
    for each in (wan, ti2v):
        for dtype in (torch.float32, torch.bfloat16):
            yield f"vae, {each.name}, {name_of(dtype)}", partial(big_vae, each, device, dtype)
    yield f"streamed, {large.name}", partial(streamed, large, device)
    yield f"few bits, {wan.name}", partial(few_bits, wan, device)
    yield f"few pairs, {wan.name}", partial(few_pairs, wan, device)
    yield f"pipeline, {wan.name}", partial(whole, wan, device)
    yield "ranks", partial(ranks, device, small)


def beside(device, work, only=""):
    return list(bench.against_diffusers(device, runs=5, only=only, work=work))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="small parts: tries the script, measures nothing"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        help="sections, by the beginnings of their names; the others stay as the file has them",
    )
    return parser.parse_args()


def main():
    asked = arguments()
    device, failed = asked.device, False
    on_gpu = torch.device(device).type == "cuda"
    card = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    here = dict(card=card, torch=torch.__version__)
    figures = json.loads(asked.output.read_text()) if asked.only and asked.output.exists() else here
    if {name: figures[name] for name in here} != here:
        sys.exit(
            f"{asked.output} was measured on {figures['card']} with torch {figures['torch']}; this is "
            f"{here}: choose another file with -o"
        )
    for name, work in sections(device, asked.small):
        if asked.only and not name.startswith(tuple(asked.only)):
            continue
        start = time.perf_counter()
        try:
            with torch.no_grad():
                figures[name] = work()
        except (
            Exception
        ):  # kept in the file, and in the exit status: the other sections are worth their minutes
            failed, figures[name] = True, dict(error=traceback.format_exc()[-2000:])
        took = time.perf_counter() - start
        print(f"{took:6.1f} s  {name}: {json.dumps(figures[name], default=str)}", flush=True)
        asked.output.write_text(json.dumps(figures, indent=2) + "\n")
        if on_gpu:
            torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
