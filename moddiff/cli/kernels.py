"""Which attention kernels run here, how fast, and how exact?  `moddiff kernels`."""

import json
import time
import warnings
from typing import Annotated

import typer

from .words import plain


def kernels(
    tokens: Annotated[
        int | None,
        typer.Option(help="queries and keys; by default 512, with a GPU 4096", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
):
    """Time each attention kernel on random [1, 12, tokens, 128], the heads of Wan 1.3B.

    With a GPU in bfloat16 there, else in float32. The error is that to float64: root mean square, relative.
    """
    import torch

    from ..attention import KERNELS
    from ..kernels import lacking

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokens = tokens or (4096 if device == "cuda" else 512)
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, tokens, 128, generator=made).to(device, dtype) for _ in range(3))
    exact = _in_float64(q, k, v)
    rows = {}
    for name, kernel in KERNELS.items():
        lack = lacking(name)
        rows[name] = {"why": f"needs {lack}"} if lack else _measured(kernel, q, k, v, exact)
    if as_json:
        print(json.dumps({"device": device, "dtype": str(dtype), "shape": list(q.shape), "kernels": rows}))
        return
    print(f"random q, k, v {list(q.shape)}, {dtype}, {device}")
    print(f"{'kernel':<16}{'seconds':>10}{'error':>10}")
    for name, row in rows.items():
        if "why" in row:
            print(plain(f"{name:<16}{'-':>10}{'-':>10}  {row['why']}"))
        else:
            print(f"{name:<16}{row['seconds']:>10.4f}{row['error']:>10.1e}")


def _measured(kernel, q, k, v, exact):
    """Seconds (median of three, after one to warm up) and error; or why it does not run."""
    import torch

    def heads():
        with torch.no_grad():
            out = kernel(q, k, v, None, q.shape[-1] ** -0.5)
        if q.is_cuda:
            torch.cuda.synchronize()
        return out

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex says that it is not compiled on a CPU
            out = heads()
    except (ValueError, ImportError, RuntimeError) as error:  # RuntimeError: PyTorch has no kernel for it
        return {"why": str(error).strip().partition("\n")[0]}
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        heads()
        seconds.append(time.perf_counter() - began)
    off = (out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    return {"seconds": sorted(seconds)[1], "error": off.item()}


def _in_float64(q, k, v):
    """Attention written out, one head at a time to spare memory.   -> [1, heads, tokens, d]"""
    import torch

    heads = [
        (queries.double() @ keys.double().mT * q.shape[-1] ** -0.5).softmax(-1) @ values.double()
        for queries, keys, values in zip(q[0], k[0], v[0])
    ]
    return torch.stack(heads)[None]
