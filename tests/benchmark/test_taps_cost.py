"""What do taps cost when nobody looks?  One transformer with and without them, in turn in one process."""

import ast
import inspect
import statistics
import time
import timeit

import torch

from moddiff import attention, dit
from moddiff.hooks import Taps

CONFIG = dict(
    model_type="t2v",
    in_dim=16,
    dim=256,
    ffn_dim=1024,
    freq_dim=128,
    text_dim=256,
    out_dim=16,
    num_heads=4,
    num_layers=6,
    text_len=64,
)


class WithoutTaps(ast.NodeTransformer):
    """Rewrites source: tap(name, x) -> x, and tap.call(name, f, *args) -> f(*args).

    Every other use of taps answers as if nobody looked.
    """

    def __init__(self):
        self.removed = 0

    def visit_Call(self, node):
        self.generic_visit(node)
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr == "call" and is_tap(called.value):
            self.removed += 1
            return ast.Call(node.args[1], node.args[2:], [])
        if (
            isinstance(called, ast.Attribute)
            and called.attr in ("edited", "watched")
            and is_tap(called.value)
        ):
            self.removed += 1
            return ast.Constant(False)
        if is_tap(called):
            self.removed += 1
            return node.args[1]
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if node.attr == "live" and is_tap(node.value):
            self.removed += 1
            return ast.Constant(None)
        return node


def is_tap(node):
    return (isinstance(node, ast.Name) and node.id == "tap") or (
        isinstance(node, ast.Attribute) and node.attr == "tap"
    )


def without_taps(module, namespace):
    """The module's classes and functions, compiled from its source with every tap taken out."""
    strip = WithoutTaps()
    tree = ast.fix_missing_locations(strip.visit(ast.parse(inspect.getsource(module))))
    tree.body = [
        node for node in tree.body if not isinstance(node, ast.ImportFrom) or node.level == 0
    ]  # ours come from the namespace
    assert strip.removed >= 5
    for name in vars(module):
        namespace.setdefault(name, vars(module)[name])
    exec(compile(tree, module.__name__ + " without taps", "exec"), namespace)
    return namespace


def test_closed_taps_cost_less_than_one_percent_of_a_tiny_dit():
    bare_attention = without_taps(attention, {"__name__": "bare_attention"})
    bare_block = without_taps(
        dit.block,
        {"__name__": "bare_block"} | {name: bare_attention[name] for name in ("attend", "tap_repeated")},
    )
    bare_dit = without_taps(dit.model, {"__name__": "bare_dit", "Block": bare_block["Block"]})
    torch.manual_seed(0)
    with_taps = dit.DiT(dit.DiTConfig(**CONFIG)).eval()
    bare = bare_dit["DiT"](dit.DiTConfig(**CONFIG)).eval()
    bare.load_state_dict(with_taps.state_dict())
    inputs = torch.randn(1, 16, 5, 12, 12), torch.tensor([500.0]), [torch.randn(12, 256)]

    times, threads = {with_taps: [], bare: []}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            assert torch.equal(with_taps(*inputs), bare(*inputs))
            for i in range(40):
                for model in (with_taps, bare) if i % 2 else (bare, with_taps):
                    start = time.process_time_ns()
                    model(*inputs)
                    times[model].append(time.process_time_ns() - start)
    finally:
        torch.set_num_threads(threads)
    ratios = [a / b for a, b in zip(times[with_taps], times[bare])]
    best = min(times[with_taps]) / min(times[bare])
    typical = statistics.median(ratios)
    print(f"with taps / without: best {best:.4f}, median {typical:.4f} of {min(times[bare]) / 1e6:.2f} ms")
    # Noise only adds time, and not to the same side each time: the smaller of two estimates of one ratio.
    assert min(best, typical) < 1.01


def noted(calls, name, method):
    """The method, which puts its name down each time it is called."""

    def called(*arguments):
        calls.append(name)
        return method(*arguments)

    return called


def test_the_taps_of_one_forward_take_less_than_one_percent_of_it_call_by_call(monkeypatch):
    torch.manual_seed(0)
    model = dit.DiT(dit.DiTConfig(**CONFIG)).eval()
    inputs = torch.randn(1, 16, 5, 12, 12), torch.tensor([500.0]), [torch.randn(12, 256)]
    calls = []
    with monkeypatch.context() as counted, torch.inference_mode():
        for name in ("__call__", "edited", "watched", "call"):
            counted.setattr(Taps, name, noted(calls, name, getattr(Taps, name)))
        model(*inputs)
    tap, x = Taps(x="n"), torch.zeros(1)

    def fastest(run, times):
        return min(timeit.repeat(run, timer=time.process_time, number=times, repeat=9)) / times

    each = {
        "__call__": fastest(lambda: tap("x", x), 2000),
        "call": fastest(lambda: tap.call("x", id, x), 2000),
        "edited": fastest(lambda: tap.edited("x", "y", "z"), 2000),
        "watched": fastest(lambda: tap.watched("x", "y"), 2000),
    }
    with torch.inference_mode():
        forward = fastest(lambda: model(*inputs), 1)
    taps = sum(each[name] for name in calls)
    print(f"{len(calls)} calls, {taps * 1e6:.1f} us of {forward * 1e3:.2f} ms: {taps / forward:.3%}")
    assert len(calls) > 10 * CONFIG["num_layers"] and taps < 0.01 * forward
