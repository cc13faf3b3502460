"""How much memory do loading and converting a large file take?

    python tests/benchmark/large_files.py [FOLDER]

A 1.3B DiT of random weights is written tensor by tensor, as fp8 with scales and as GGUF blocks (q8_0), 1.5 GB
each. Each is loaded, its values checked, and converted to bf16, in a process of its own, whose memory is read
from Linux's /proc, without the pages of files, which the system takes back at will.
"""

import json
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from moddiff.weights import configs, convert, load_component, open_release
from moddiff.weights.building import rename

CODES = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}


def shapes():
    """{official name: shape} of the model."""
    config = open_release("wan2.1-t2v-1.3b").parts["dit"].config
    state = rename(configs.empty("dit", config).state_dict(), "dit", "official", config)
    return {name: list(x.shape) for name, x in state.items()}


def quantized(name, shape):
    return len(shape) == 2 and name.startswith("blocks.") and shape[1] % 32 == 0 and "modulation" not in name


def write_fp8(path):
    entries = {}
    for name, shape in shapes().items():
        entries[name] = (torch.float8_e4m3fn if quantized(name, shape) else torch.float32), shape
        if quantized(name, shape):
            entries[name.replace(".weight", ".scale_weight")] = torch.float32, []
    head, at = {}, 0
    for name, (dtype, shape) in entries.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        head[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, shape in entries.values():
            file.write((torch.rand(shape) * 0.1).to(dtype).reshape(-1).view(torch.uint8).numpy().data)


def write_gguf(path):
    head, rows, at = b"", [], 0
    for name, shape in shapes().items():
        number = 8 if quantized(name, shape) else 0
        kept = shape if len(shape) <= 4 else [shape[0], torch.Size(shape[1:]).numel()]
        size = torch.Size(shape).numel() * 4 if number == 0 else torch.Size(shape).numel() // 32 * 34
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(kept))
        head += struct.pack(f"<{len(kept)}QIQ", *kept[::-1], number, at)
        rows.append((number, shape, size))
        at += -(-size // 32) * 32
    facts = b""
    for name, shape in shapes().items():
        if len(shape) > 4:
            key = f"comfy.gguf.orig_shape.{name}".encode()
            facts += struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 5, len(shape))
            facts += struct.pack(f"<{len(shape)}i", *shape)
    count = sum(len(shape) > 4 for shape in shapes().values())
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(rows), count) + facts + head)
        file.write(bytes(-file.tell() % 32))
        for number, shape, size in rows:
            if number:
                blocks = torch.randint(0, 256, (size // 34, 34), dtype=torch.uint8)
                blocks[:, :2] = torch.tensor([0.001]).half().view(torch.uint8)
            else:
                blocks = (torch.rand(shape) * 0.1).view(-1).view(torch.uint8)
            file.write(blocks.contiguous().numpy().data)
            file.write(bytes(-size % 32))


def beside_files():
    """Bytes of this process's memory that are not pages of files."""
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) * 1024


def measure(what, path):
    """Do it, and look at the memory every hundredth of a second."""
    before, most, done = beside_files(), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            most[0] = max(most[0], beside_files())

    watcher = threading.Thread(target=watch)
    watcher.start()
    if what == "load":
        kept = load_component(path, "dit", dtype="as stored")
    else:
        kept = convert(path, path.with_suffix(".converted"), dtype="bf16")
    done.set()
    watcher.join()
    after = beside_files()
    del kept
    peak, kept = (most[0] - before) / 1e6, (after - before) / 1e6
    print(
        f"{what:8} {path.name:5} beside the pages of the file: peak {peak:5.0f} MB, in the end {kept:5.0f} MB"
    )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[1], Path(sys.argv[2]))
        sys.exit()
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        for write in (write_fp8, write_gguf):
            path = Path(folder) / write.__name__.removeprefix("write_")
            write(path)
            print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
            for what in ("load", "convert"):
                subprocess.run([sys.executable, __file__, what, str(path)], check=True)
                path.with_suffix(".converted").unlink(missing_ok=True)
            path.unlink()
