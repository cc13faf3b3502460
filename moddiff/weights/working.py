"""What does one pass of each component take beside its weights?  Formulas, and the forecast of a run.

The constants come from counts of live tensors; tests/test_fit.py counts again.
"""

from functools import lru_cache
from math import prod

from . import configs

# Peak bytes of one forward pass, measured by counting every live tensor of our modules; tests/test_fit.py
# counts again. Feature maps of the widest full-resolution stage alive at once, by pixel patch (1: VAE 2.1, 2:
# VAE 2.2) ...
DECODE_MAPS = {1: 4.1, 2: 7.3}
# ... and a chunked pass takes as much as a whole pass over this many frames: four new ones and the time
# cache.
CHUNK_FRAMES = {1: 11, 2: 8.6}


# Even without memory a model of 40 blocks takes its time to build: once for each config.
@lru_cache(maxsize=32)
def parameters(kind, config):
    """How many numbers a component with this config has."""
    return sum(p.numel() for p in configs.empty(kind, config).parameters())


def forecast(parts, size, frames, dtype=None, widths=None):
    """Bytes that weights and one forward pass of each component will take, for one video.

    parts   {part name: config dataclass}
    size    (height, width) in pixels;  frames: 4n + 1
    dtype   of all weights; None: `widths`, {part name: bytes per number}, else 16 bit
    ->      dict of bytes: per part `weights` and `working`; `peak` with everything in memory;
            `peak_one_at_a_time`, the largest part alone, where each is loaded, used and freed; `written_out`

    The working memory of the DiT counts one branch; guidance runs the two one after the other.
    """
    # A width need not be whole: a file may hold some tensors in 32 bits and the rest in 16.
    wide = {name: dtype.itemsize if dtype else (widths or {}).get(name, 2) for name in parts}
    tokens = tokens_of(parts["dit"], parts["vae"], size, frames)
    whole, chunked = decode_bytes(parts["vae"], size, frames, wide["vae"])
    rows = {}
    for name, config in parts.items():
        kind = name.removesuffix("_low")
        working = working_bytes(kind, config, size, frames, tokens, wide[name])
        rows[name] = {"weights": round(parameters(kind, config) * wide[name]), "working": round(working)}
    stored = sum(row["weights"] for row in rows.values())
    bits = ", ".join(f"{name} {8 * width:g} bit" for name, width in wide.items())
    return {
        "size": list(size),
        "frames": frames,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch.") if dtype else bits,
        "parts": rows,
        "weights": stored,
        "peak": stored + max(row["working"] for row in rows.values()),
        "peak_one_at_a_time": max(row["weights"] + row["working"] for row in rows.values()),
        # Scores and probabilities, four bytes each, for all pairs of tokens in every head of a block.
        "written_out": 8 * parts["dit"].num_heads * tokens**2,
        "vae_whole": round(whole),
        "vae_chunked": round(chunked),
    }


def tokens_of(dit, vae, size, frames):
    """How many tokens the dit sees of a video."""
    (ft, fh, fw), (height, width) = vae.stride, size
    grid = (frames - 1) // ft + 1, height // fh, width // fw
    return prod(n // p for n, p in zip(grid, dit.patch_size))


def working_bytes(kind, config, size, frames, tokens, width):
    """Peak bytes of one pass of a component beside its weights.   width: bytes of a number"""
    width = max(2, width)  # weights of 8 bits and fewer are expanded to 16
    match kind:
        case "dit":
            return dit_bytes(config, tokens, width)
        case "text":
            return text_bytes(config, width)
        case "image":
            return config.num_tokens * config.dim * 60
        case "vae":
            return min(decode_bytes(config, size, frames, width))


def dit_bytes(config, tokens, width):
    """Peak of one block: the float32 stream, and queries, keys and values or the wide layer after it."""
    dim, head = config.dim, config.dim // config.num_heads
    # They take turns, so the larger counts. Bytes for each token and channel, as counted (see the top).
    attention, ffn = 28 + width, 20 - width + 2 * width * config.ffn_dim / dim
    # Text-or-image models have six modulations per token, the others per video.
    per_token_time = 52 if config.model_type == "ti2v" else 0
    # CLIP's 16 x 16 patches and its class token.
    words = config.text_len + (257 if config.image_dim else 0)
    prompt = 2 * width * dim * config.num_layers * words  # its keys and values, kept from step to step
    return tokens * (dim * (max(attention, ffn) + per_token_time) + 16 * config.in_dim + 5 * head) + prompt


def decode_bytes(config, size, frames, width):
    """(in one pass, in chunks): feature maps at full resolution, and the finished video."""
    pixels = prod(size)
    # The widest map at full resolution: Wan 2.1 halves the width of the stage before it on the way up.
    base = max(config.dim, config.dec_dim or 0) * max(config.dim_mult[0], config.dim_mult[1] / 2)
    frame = DECODE_MAPS[config.patch] * base / config.patch**2 * pixels * width
    # In chunks the maps stay small, but all the finished frames lie beside them.
    return frame * frames, frame * min(frames, CHUNK_FRAMES[config.patch]) + 3 * pixels * frames * width


def text_bytes(config, width):
    """Attention over a prompt of full length, its bias and its probabilities."""
    return config.text_len**2 * config.num_heads * (8 + width) + config.text_len * (
        config.dim * 12 + config.dim_ffn * 3 * width
    )
