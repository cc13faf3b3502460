"""Does the bench compare equal work, and print what it measured?"""

import json
import subprocess
import sys
import timeit
from functools import partial, partialmethod
from pathlib import Path

import pytest
import small
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moddiff import bench, cli, goals, weights
from moddiff.attention import use_kernel
from moddiff.pipeline import Pipeline


def run(*arguments):
    """The exit code of `moddiff bench`, run in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *map(str, arguments)])
    return end.value.code


def test_it_measures_a_sentence_to_a_video(tmp_path, monkeypatch, capsys):
    real = weights.load(small.release(tmp_path / "t2v"))
    real = Pipeline(**real.components, name=real.name, defaults=small.SAMPLING)
    monkeypatch.setattr(weights, "load", lambda model: real)
    monkeypatch.setattr(bench, "cold", lambda model: 1.5)
    assert run("--model", "small", "--runs", 1, "-o", tmp_path / "bench.json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "bench.json").read_text())
    parts = {"prepare", "text", "dit_forward", "solver_step", "vae_decode", "mp4"}
    assert figures["seconds"]["warm"] > 0 and set(figures["parts"]) == parts
    assert min(figures["parts"].values()) > 0


@pytest.fixture
def tiny_parts(monkeypatch):
    """The bench beside Diffusers, on parts small enough for a test."""
    changes = dict(
        dit=dict(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, text_len=64),
        vae=dict(dim=8, num_res_blocks=1),
        text=dict(dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2, text_len=64),
    )
    monkeypatch.setattr(bench, "bfloat16_is_fast", lambda: True)
    # Dynamo alone: what Inductor makes of its graphs is torch's affair, and takes a minute.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(bench, "compiled", partial(bench.compiled, backend="eager"))
    monkeypatch.setattr(goals, "fastest", lambda work, number: timeit.timeit(work, number=3) / 3)
    work = bench.Work(changes=changes, size=(32, 48), frames=5, vae_size=(32, 48), vae_frames=5)
    monkeypatch.setattr(bench, "ON_A_CPU", work)


def test_beside_diffusers_it_compares_equal_work(tiny_parts, tmp_path, capsys):
    assert run("--against", "diffusers", "--runs", 2, "-o", tmp_path / "bench.json") == 0
    table = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    kinds = ("dit, eager", "dit, compiled"), ("vae, decode",), ("text, 20 tokens",)
    expected = [f"{kind}, {dtype}" for part in kinds for dtype in ("float32", "bfloat16") for kind in part]
    assert [row["name"] for row in rows] == [*expected, "closed taps", "import"]
    compared = rows[: len(expected)]
    for row, printed in zip(compared, table[1:], strict=False):
        assert printed.startswith(row["name"]) and f"{row['ratio']:.2f}" in printed
        assert row["difference"] < (1e-4 if "float32" in row["name"] else 0.2), row
        assert min(row["ours"], row["theirs"], row["ratio"], row["peak"], row["their_peak"]) > 0

    said = table[table.index("") + 2 :]
    of = [
        goal.name
        for goal in goals.ON_A_CPU
        for _ in range(1 if goal.name in ("closed taps", "import") else 2)
    ]
    assert len(said) == len(of) == 13
    for name, line in zip(of, said, strict=True):
        assert line.startswith(name) and line.split()[-1] in ("met", "missed"), line


def test_a_goal_is_met_at_its_edge_and_says_so():
    most, least = goals.Goal("a", "ratio", most=0.8), goals.Goal("a", "share", least=0.85)
    assert most.met(0.8) and not most.met(0.81) and least.met(0.85) and not least.met(0.84)
    rows = [{"name": "a", "ratio": 0.81, "share": 0.9}]
    assert most.line(rows[0]).endswith("missed") and least.line(rows[0]).endswith(" met")


def test_the_operations_of_a_step_are_those_that_torch_counts_but_for_its_ends():
    """torch's counter knows the products, and attention that is written out."""
    dit = small.dit(dim=64, ffn_dim=256, num_layers=6)
    x, t, *_ = dit.example((64, 96), 9)
    context = dit.prepare([torch.randn(32, dit.config.text_dim)])
    use_kernel(dit, "math")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        dit(x, t, context)
    tokens = x[0, 0].numel() // 4
    assert counted.get_total_flops() == pytest.approx(goals.step_flops(dit.config, tokens, 32), rel=0.03)


def test_it_measures_one_part_and_refuses_what_it_does_not_know(tiny_parts, capsys):
    assert run("--against", "diffusers", "--only", "vae", "--runs", 1) == 0
    table, goals_of_it = capsys.readouterr().out.split("\n\n")
    assert [line.split(",")[0] for line in table.splitlines()[1:]] == ["vae", "vae"]
    assert [line.split(",")[0] for line in goals_of_it.splitlines()[1:]] == ["vae"] * 4
    for options, message in (
        (("--against", "vllm"), "--against vllm; expected diffusers"),
        (("--against", "diffusers", "--only", "clip"), "expected one of dit, vae, text"),
        (("--runs", 0), "runs=0; expected 1 or more"),
    ):
        assert run(*options) == 2 and message in capsys.readouterr().err


def test_the_peak_of_a_run_is_what_it_held_at_once():
    def work():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return second.sum()

    assert 8_000_000 <= bench.peak_bytes(work, "cpu") < 8_100_000


def test_the_script_for_machines_with_an_accelerator_runs_to_its_end(tmp_path):
    script = Path(__file__).parent / "benchmark" / "accelerator.py"
    only = (
        "goldens",
        "text",
        "dit",
        "vae, wan2.1",
        "step caches",
        "streamed",
        "few bits",
        "pipeline",
    )
    command = [sys.executable, script, "--device", "cpu", "--small", "-o", "figures.json", "--only", *only]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert max(figures["goldens"].values()) < 2e-5
    assert (
        figures["dit, wan2.1-t2v-1.3b"]["weights_gb"]
        == figures["dit, wan2.1-t2v-1.3b"]["forecast_weights_gb"]
    )
    assert set(figures["streamed, wan2.1-t2v-14b"]) == {
        f"keep {keep}, ahead {ahead}" for keep, ahead in ((0, 0), (0, 1), (1, 1), (2, 1))
    }
    bits = figures["few bits, wan2.1-t2v-1.3b"]
    assert bits["bfloat16"]["difference"] == 0 < bits["int8"]["difference"] < bits["q4_0"]["difference"]
    assert bits["q4_0"]["weights_gb"] < bits["int8"]["weights_gb"] < bits["bfloat16"]["weights_gb"]
    whole = figures["pipeline, wan2.1-t2v-1.3b"]
    assert whole["captured_bytes"] == whole["forecast_captured_bytes"]
