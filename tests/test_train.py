"""The training loop: resumable, the same in one process and in two, and written whole or not at all."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moddiff.tiny import train
from moddiff.tiny.muon import Recipe


class Line:
    """A stage that fits a line."""

    name, recipe = "line", Recipe(muon=0.2, adam=0.1, ema=0.9)

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.seen = []

    def draw(self, step, rng):
        return dict(step=step, x=torch.from_numpy(rng.standard_normal((8, 3))).float())

    def loss(self, step, x):
        self.seen.append((step, float(x[0, 0])))
        loss = (self.model(x) - x[:, :2]).square().mean()
        return loss, dict(error=loss.detach())


def test_a_run_broken_off_and_resumed_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda step, steps: 1.0)
    whole = train.train(Line(), tmp_path / "whole", 12)
    train.train(Line(), tmp_path / "broken", 5)
    second = Line()
    resumed = train.train(second, tmp_path / "broken", 12)
    assert [step for step, _ in second.seen] == list(range(5, 12))
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


TOGETHER = """
import sys
import numpy as np, torch, torch.distributed as dist
from torch import nn
from moddiff.tiny import train
from moddiff.tiny.muon import Recipe

class Three:
    name, recipe = "three", Recipe(muon=0.02, adam=0.01, ema=0.9)
    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))  # for two processes
    def draw(self, step, rng):
        alone = [np.random.default_rng([0, step, rank]) for rank in (0, 1)]
        rngs = [rng] if dist.is_initialized() else alone
        return dict(x=torch.stack([torch.from_numpy(each.standard_normal((8, 4))).float() for each in rngs]))
    def loss(self, x):
        return (self.model(x) - x.flip(-1)).square().mean(), {}

def work(folder):
    train.train(Three(), folder, 6)

if __name__ == "__main__":
    torch.set_num_threads(1)
    train.together(work, 2, sys.argv[1] + "/two")
    train.train(Three(), sys.argv[1] + "/one", 6)
"""


def test_two_processes_learn_what_one_would_from_both_their_batches(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    subprocess.run([sys.executable, tmp_path / "together.py", tmp_path], check=True, timeout=300)
    one, two = (load_file(tmp_path / name / "three" / "ema.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


ALONE = """
import sys, weakref
import torch, torch.distributed as dist
from moddiff.tiny import train

def work():
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports much of torch.distributed
    groups.append(weakref.ref(dist.group.WORLD))

groups = []
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
train._join(0, 1, store.port, work, ())
sys.exit(groups[0]() is not None)
"""


def test_a_process_that_has_left_the_others_has_no_thread_of_theirs_any_more():
    """Else the interpreter ends under a thread that still holds a tensor, and now and then that aborts it."""
    subprocess.run([sys.executable, "-c", ALONE], check=True, timeout=300)


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    stage = Line()
    batch = stage.draw(0, np.random.default_rng([0, 999]))
    before = stage.loss(**batch)[1]["error"]
    train.train(stage, tmp_path, 150)
    assert stage.loss(**batch)[1]["error"] < 0.05 * before
    rows = list(csv.DictReader(open(tmp_path / "line" / "log.csv")))
    assert {row["figure"] for row in rows} == {"loss", "error"} and int(rows[-1]["step"]) == 150


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(tmp_path):
    class Broken(Line):
        def loss(self, step, x):
            loss, figures = super().loss(step, x)
            return loss * (float("nan") if step == 3 else 1), figures

    stage = Broken()
    with pytest.raises(FloatingPointError, match="gradient at step 3 is not finite"):
        train.train(stage, tmp_path, 10)
    assert all(p.isfinite().all() for p in stage.model.parameters())


def test_an_unknown_stage_and_a_stage_before_its_time_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="'clap' is not one of vae, text, t2v, decoder, clip, i2v"):
        train.run_stage("clap", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="train-tiny --stage vae"):
        train.run_stage("t2v", steps=1, folder=tmp_path, clips=2)
    (tmp_path / "vae").mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "vae" / "ema.safetensors")
    with pytest.raises(
        FileNotFoundError, match="train-tiny --stage text"
    ):  # before clips are drawn and encoded
        train.run_stage("t2v", steps=1, folder=tmp_path, clips=2)
    assert not (tmp_path / "clips").exists() and not (tmp_path / "tokenizer.json").exists()


def test_figures_that_come_and_go_are_averaged_where_they_are():
    rows = [
        dict(a=1.0, b=2.0, c=torch.tensor(1.0)),
        dict(a=2.0, c=float("nan"), d=torch.tensor(float("nan"))),
    ]
    assert train.means_of(rows) == dict(a=1.5, b=2.0, c=1.0)


def test_rates_by_time_rise_stay_and_fall_to_nothing():
    shares = (0, 0.01, 0.02, 0.3, 0.4, 0.7, 1, 1.1)
    expected = pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0, 0])
    assert [train.learning_rate_in_time(share) for share in shares] == expected


class Clock:
    """A clock on which every look takes a tenth of a second."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 0.1
        return self.now


def test_a_run_for_a_time_stops_in_time_and_a_resumed_one_has_only_the_rest(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(train, "time", Clock())
    monkeypatch.setattr(train, "learning_rate_in_time", lambda share: rates.append(share) or 1.0)
    train.train(Line(), tmp_path, seconds=5)
    first = len(rates)
    train.train(Line(), tmp_path, seconds=10)
    assert 0.95 <= rates[first - 1] <= 1 and 0.5 <= rates[first] <= 0.51
    assert 0.95 <= rates[-1] <= 1 and first < 100 and len(rates) < 200
    train.train(Line(), tmp_path, seconds=10)  # the time is over: nothing happens
    assert torch.load(tmp_path / "line" / "checkpoint.pt")["step"] == len(rates)


def test_options_that_do_not_go_together_are_refused_before_the_work(tmp_path):
    for options, words in (
        (dict(steps=3, seconds=5), "steps = 3 and seconds = 5: give one of them"),
        (dict(workers=2, seconds=5), "workers = 2 processes train together on the CPU"),
        (dict(workers=2, device="cuda"), "with device='cuda' or seconds give workers=1"),
        (dict(batch=0), "batch = 0; expected 1 or more"),
        (dict(seconds=-1.0), "seconds = -1.0; expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            train.run_stage("vae", folder=tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()
