"""Does moddiff do on an accelerator what it does on a CPU, and do its forecasts hold at Wan's real sizes?  Random weights; nothing is downloaded.

    python tests/benchmark/accelerator.py -o guides/figures/accelerator.json

Not collected by pytest: the machines that test every commit have no accelerator. The file is written after each section, so that a run that is cut
short leaves what it measured. An exception ends its own section, is kept in the file, and makes the exit status 1.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch
from moddiff.edits import zero
from moddiff.inspection import forecast, text_bytes
from moddiff.releases import open_release
from safetensors import safe_open

import moddiff
from moddiff import configs, weights
from moddiff.attention import attend
from moddiff.hooks import capture, patch
from moddiff.pipeline import Pipeline
from moddiff.text import Tokenizer
from moddiff.tiny import score, targets

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPT = "a red circle moving left on a black background"
GB = 1e9
SIZES = {  # release: (size, frames) of its own default
    "wan2.1-t2v-1.3b": ((480, 832), 81),
    "wan2.2-ti2v-5b": ((704, 1280), 121),
    "wan2.1-t2v-14b": ((720, 1280), 81),
}


def kernels(device):
    """Largest difference of each attention kernel from float64 on the CPU: float32 and bfloat16, heads of 64 and of Wan's 128, with and without a bias."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for width in (64, 128):
            source = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(2, 3, n, width, generator=source).to(dtype) for n in (257, 515, 515))
            bias = torch.randn(3, 257, 515, generator=source)
            for name in ("math", "sdpa", "flex"):
                for words, given in (("no bias", None), ("bias", bias)):
                    exact = attend(
                        q.double(),
                        k.double(),
                        v.double(),
                        bias=None if given is None else given.double(),
                        kernel="math",
                    )
                    ours = attend(
                        q.to(device),
                        k.to(device),
                        v.to(device),
                        bias=None if given is None else given.to(device),
                        kernel=name,
                    )
                    found[f"{name}, {name_of(dtype)}, {width}, {words}"] = distance(ours, exact)
    return found


def goldens(device):
    """Largest difference of every component, in float32 (no TF32) on the device, from what the official code computed on a CPU."""
    kinds = {
        "t5_encoder": "text",
        "clip_visual": "image",
        "dit_t2v": "dit",
        "dit_i2v": "dit",
        "dit_flf2v": "dit",
        "dit_ti2v": "dit",
        "vae2_1": "vae",
        "vae2_2": "vae",
    }
    found, tf32 = {}, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    for name, kind in kinds.items():
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
            tensors = {each: file.get_tensor(each) for each in file.keys()}
            config = json.loads(file.metadata()["config"])
        module = weights.build(
            kind,
            config,
            {each.removeprefix("weight."): x for each, x in tensors.items() if each.startswith("weight.")},
        ).to(device)
        seen = {each: x.to(device) for each, x in tensors.items() if not each.startswith("weight.")}
        if kind == "text":
            mask = seen["in.mask"]
            pairs = [(module(seen["in.ids"], mask) * mask[..., None], seen["out.hidden"] * mask[..., None])]
        elif kind == "image":
            pairs = [
                (
                    torch.cat([module.encode(seen[f"in.video{i}"].transpose(0, 1)) for i in (0, 1)]),
                    seen["out.features"],
                )
            ]
        elif kind == "vae":
            pairs = [
                (module.encode(seen["in.video"], chunked), seen["out.mu_normalized"])
                for chunked in (False, True)
            ]
            pairs += [(module.decode(seen["in.z"], chunked), seen["out.video"]) for chunked in (False, True)]
        else:
            v = module(
                seen["in.x"],
                seen["in.t"],
                [seen["in.context0"], seen["in.context1"]],
                image=seen.get("in.clip_fea"),
                y=seen.get("in.y"),
            )
            pairs = [(v, seen["out.v"])]
        found[name] = max(distance(ours, official) for ours, official in pairs)
    torch.backends.cudnn.allow_tf32 = tf32
    return found


def tiny(device):
    """The shipped models: how many of 32 held-out prompts are right, is a run repeated to the bit, how fast."""
    found = {}
    for dtype in ("fp32", "bf16"):
        pipe = moddiff.load("tiny-t2v", dtype=dtype, device=device)
        verdicts = targets.t2v(pipe, 1, 32)
        first, second = (pipe(PROMPT, seed=3).frames for _ in range(2))
        found[dtype] = dict(
            right=score.summarise(verdicts)["all"],
            repeats_to_the_bit=bool((first == second).all()),
            warm_seconds=targets.seconds(pipe),
        )
    picture = pipe(PROMPT, seed=3).frames[0]
    i2v = moddiff.load("tiny-i2v", device=device)(PROMPT, image=picture, seed=0)
    found["i2v_first_frame_psnr"] = float(score.psnr(picture, i2v.frames[0]))
    return found


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


def compiled(device):
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
        eager_ms=1e3 * timed(lambda: dit(x, t, text), device, 20),
        compiled_ms=1e3 * timed(lambda: fast(x, t, text), device, 20),
    )


def big_dit(release, device):
    """One pass of a DiT of real size in bfloat16, beside the forecast of `moddiff inspect`.   -> seconds, bytes, teraflops a second"""
    (height, width), frames = SIZES[release]
    config = open_release(release).parts["dit"].config
    dit = random("dit", config, torch.bfloat16, device)
    stored = allocated(dit)
    x, t, _, *_ = dit.example(size=(height, width), frames=frames)
    x = torch.randn(x.shape, device=device)
    text = dit.prepare([torch.randn(512, config.text_dim, device=device, dtype=torch.bfloat16)])
    cast = forecast(
        {"dit": config, "vae": open_release(release).parts["vae"].config},
        (height, width),
        frames,
        widths={"vae": 4},
    )
    moments = torch.full(
        (1, cast["tokens"]) if config.model_type == "ti2v" else (1,), 500.0, device=device
    )  # ti2v: a time for each token
    dit(x[:, :, :2, :16, :16], moments[:, :128] if moments.ndim == 2 else moments, text)  # loads the kernels
    begin = reset(device)
    seconds = timed(lambda: dit(x, moments, text), device, 2)
    peak = torch.cuda.max_memory_allocated(device)
    return dict(
        size=[height, width],
        frames=frames,
        tokens=cast["tokens"],
        seconds=seconds,
        tflops_a_second=pass_flops(config, cast["tokens"]) / seconds / 1e12,
        weights_gb=stored / GB,
        forecast_weights_gb=cast["parts"]["dit"]["weights"] / GB,
        working_gb=(peak - stored) / GB,
        above_start_gb=(peak - begin) / GB,
        forecast_working_gb=cast["parts"]["dit"]["working"] / GB,
    )


def big_vae(release, device, dtype):
    """Decoding and encoding a whole video in chunks, beside the forecast. torch's own settings: convolutions in float32 may use TF32 inside."""
    (height, width), frames = SIZES[release]
    release = open_release(release)
    config = release.parts["vae"].config
    vae = random("vae", config, dtype, device)
    ft, fh, fw = config.stride
    latent = torch.randn(1, config.z_dim, (frames - 1) // ft + 1, height // fh, width // fw, device=device)
    cast = forecast(
        {"dit": release.parts["dit"].config, "vae": config},
        (height, width),
        frames,
        widths={"vae": dtype.itemsize},
    )
    stored, found = (
        allocated(vae),
        dict(size=[height, width], frames=frames, forecast_working_gb=cast["parts"]["vae"]["working"] / GB),
    )
    video = vae.decode(latent[:, :, :2], chunked=True)  # chooses the convolution algorithms
    vae.encode(video, chunked=True)
    for name, work in (
        ("decode", lambda: vae.decode(latent, chunked=True)),
        ("encode", lambda: vae.encode(video, chunked=True)),
    ):
        reset(device)
        start = time.perf_counter()
        result = work()
        torch.cuda.synchronize(device)
        found |= {
            f"{name}_seconds": time.perf_counter() - start,
            f"{name}_working_gb": (torch.cuda.max_memory_allocated(device) - stored) / GB,
        }
        video = result if name == "decode" else video
    return found


def big_text(release, device):
    """One prompt of full length through UMT5-XXL in bfloat16."""
    config = open_release(release).parts["text"].config
    text = random("text", config, torch.bfloat16, device)
    stored = allocated(text)
    ids = torch.randint(2, config.vocab, (1, 512), device=device)
    text(ids[:, :8])
    reset(device)
    seconds = timed(lambda: text(ids), device, 3)
    return dict(
        seconds=seconds,
        weights_gb=stored / GB,
        working_gb=(torch.cuda.max_memory_allocated(device) - stored) / GB,
        forecast_working_gb=text_bytes(config, 2) / GB,
    )


def whole(release, device):
    """The whole pipeline at real size, every part on the card: four steps of random weights, with one capture, beside `.cost`."""
    (height, width), frames = SIZES[release]
    found = open_release(release)
    parts = {
        name: random(name, part.config, torch.float32 if name == "vae" else torch.bfloat16, device)
        for name, part in found.parts.items()
    }
    parts["text"].tokenizer = Tokenizer(
        Path(moddiff.__file__).parent / "tiny" / "weights" / "tokenizer.json", 512
    )
    pipe = Pipeline(**parts, task=found.task, name=release, defaults=found.sampling)
    reset(device)
    start = time.perf_counter()
    video = pipe(PROMPT, steps=4, size=(height, width), frames=frames)
    torch.cuda.synchronize(device)
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated(device)
    cast = forecast(
        {name: part.config for name, part in found.parts.items()}, (height, width), frames, widths={"vae": 4}
    )
    session = capture(
        pipe,
        "dit.blocks.15.cross_attn.probs",
        steps=[1],
        branch="cond",
        dtype=torch.float16,
        device="cpu",
        limit=None,
    )
    cost = session.cost(
        size=(height, width), frames=frames, words=len(parts["text"].encode([PROMPT])[0])
    ).bytes
    with session as seen:
        pipe(PROMPT, steps=2, size=(height, width), frames=frames)
    kept = sum(value.numel() * value.element_size() for _, value in seen)
    return dict(
        seconds=seconds,
        steps=4,
        video=list(video.frames.shape),
        peak_gb=peak / GB,
        forecast_peak_gb=cast["peak"] / GB,
        captured_bytes=kept,
        forecast_captured_bytes=cost,
    )


def pass_flops(c, n, words=512):
    """As in guides/weights.md: multiplications and additions of one pass over n tokens, times two."""
    linear = 2 * n * c.num_layers * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    return linear + 4 * c.num_layers * c.dim * n * (n + words)


def random(kind, config, dtype, device):
    """A component of that config with random weights, made on the device."""
    module = configs.empty(kind, config).to(dtype).to_empty(device=device).requires_grad_(False)
    source = torch.Generator(device).manual_seed(0)
    for value in module.parameters():
        value.normal_(0, 0.02, generator=source)
    return module


def allocated(module):
    return sum(value.numel() * value.element_size() for value in [*module.parameters(), *module.buffers()])


def reset(device):
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def timed(work, device, runs):
    """Fastest of a few runs, in seconds, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def distance(ours, exact):
    return float((ours.detach().cpu().double() - exact.detach().cpu().double()).abs().max())


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def sections(device):
    yield "kernels", lambda: kernels(device)
    yield "goldens", lambda: goldens(device)
    yield "tiny", lambda: tiny(device)
    yield "looking", lambda: looking(device)
    yield "compiled", lambda: compiled(device)
    yield "text, UMT5-XXL", lambda: big_text("wan2.1-t2v-1.3b", device)
    for release in SIZES:
        yield f"dit, {release}", lambda release=release: big_dit(release, device)
    for release in ("wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"):
        for dtype in (torch.float32, torch.bfloat16):
            yield (
                f"vae, {release}, {name_of(dtype)}",
                lambda release=release, dtype=dtype: big_vae(release, device, dtype),
            )
    yield "pipeline, wan2.1-t2v-1.3b", lambda: whole("wan2.1-t2v-1.3b", device)


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("-o", "--output", type=Path, default=Path("accelerator.json"))
    asked.add_argument(
        "--only",
        nargs="*",
        help="sections, by the beginnings of their names; the others stay as the file has them",
    )
    asked.add_argument("--device", default="cuda")
    chosen = asked.parse_args()
    device, failed = chosen.device, False
    here = dict(card=torch.cuda.get_device_name(device), torch=torch.__version__)
    found = json.loads(chosen.output.read_text()) if chosen.only and chosen.output.exists() else here
    if {name: found[name] for name in here} != here:
        sys.exit(
            f"{chosen.output} was measured on {found['card']} with torch {found['torch']}; this is {here}: choose another file with -o"
        )
    for name, work in sections(device):
        if chosen.only and not name.startswith(tuple(chosen.only)):
            continue
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                found[name] = work()
        except Exception:  # kept in the file, and in the exit status: the other sections are still worth their minutes on the card
            failed, found[name] = True, dict(error=traceback.format_exc()[-2000:])
        print(
            f"{time.perf_counter() - start:6.1f} s  {name}: {json.dumps(found[name], default=str)}",
            flush=True,
        )
        chosen.output.write_text(json.dumps(found, indent=2) + "\n")
        torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
