"""Does a run on record give the same bytes in a new process, or say what differs?"""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import small
import torch
from PIL import Image
from toy import message

import moddiff
from moddiff import experiments, patch
from moddiff.experiments import NotRepeatable, again, run
from moddiff.experiments.recipes import made, objects_in, plain, recipe, value_of
from moddiff.extensions import adapted, offloaded, quantized, tiled
from moddiff.fingerprints import fingerprint
from moddiff.guidance import APG, CFG, NAG, CFGZero, SkipLayer, rescaled
from moddiff.remote import RemoteError, serving
from moddiff.solvers import DPMSolverPP, UniPC

PROMPT = "a red circle moving left"
SHORT = dict(frames=5, size=(32, 48), steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.release(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return small.release(tmp_path_factory.mktemp("i2v"), "i2v")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs.sqlite"


def picture(path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def moddiff_runs(*words, cwd=None):
    """`moddiff runs ...` in a process of its own.   -> (exit code, what it said)"""
    done = subprocess.run(
        [sys.executable, "-m", "moddiff", "runs", *map(str, words)], capture_output=True, text=True, cwd=cwd
    )
    return done.returncode, done.stdout + done.stderr


def kinds(folder, i2v, tmp_path):
    """Runs of all kinds: (pipeline, options)."""
    pipe, still = moddiff.load(folder), moddiff.load(i2v)
    fresh = adapted(pipe.dit, rank=2)
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    fresh.save(tmp_path / "mine.safetensors")
    stack = offloaded(quantized(adapted(pipe.dit, tmp_path / "mine.safetensors"), "int8"), keep=1)
    yield "t2v", pipe, dict(seed=-1)
    yield "i2v", still, dict(image=picture(tmp_path / "first.png"), seed=1)
    yield "stack", pipe.replace(dit=stack, vae=tiled(pipe.vae, size=(24, 24), overlap=(8, 8))), dict(seed=2)
    yield "rewriter", pipe, dict(rewrite=lambda prompt: prompt + " on a white background", seed=3)
    yield "objects", pipe, dict(solver=DPMSolverPP(order=3), scale=CFG(3.0, interval=(0.1, 0.9)), seed=4)
    yield "profile", moddiff.load(folder, profile="low_memory", dtype="bf16"), dict(solver="euler", seed=5)


def test_runs_of_all_kinds_give_the_same_bytes_in_a_new_process(folder, i2v, file, tmp_path):
    for number, (kind, pipe, options) in enumerate(kinds(folder, i2v, tmp_path), 1):
        video = pipe(PROMPT, **SHORT, **options, store=file)
        assert video.run == number, kind
    (tmp_path / "first.png").unlink()  # its pixels are on record
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number in range(1, 7):
        said = moddiff_runs("again", number, "--store", file, cwd=elsewhere)
        assert said == (0, f"run {number} again: the same bytes\n")
    last = moddiff_runs("again", 1, "--store", file, "-o", tmp_path / "out.webp")
    assert last[0] == 0 and moddiff.Video.open(tmp_path / "out.webp") == run(file, 1).video


def test_a_rewriter_is_not_asked_again(folder, file):
    asked = []

    def rewriter(prompt):
        asked.append(prompt)
        return f"{prompt} {len(asked)}"

    moddiff.load(folder)(PROMPT, **SHORT, store=file, rewrite=rewriter)
    assert again(file, 1).same and asked == [PROMPT]


def test_the_shipped_tiny_model_again(file):
    moddiff.load("tiny")(PROMPT, seed=1, steps=2, store=file)
    assert moddiff_runs("again", 1, "--store", file) == (0, "run 1 again: the same bytes\n")


# ---- what differs is said ----


def test_other_weights_are_named_before_the_work(tmp_path, file, monkeypatch):
    folder = small.release(tmp_path)
    pipe = moddiff.load(folder)
    pipe(PROMPT, **SHORT, store=file)
    weights = folder / "transformer" / "model.safetensors"
    state = {name: x * 1.01 for name, x in pipe.dit.state_dict().items()}
    small.save_file(state, weights)
    error = message(NotRepeatable, lambda: again(file, 1))
    assert "run 1 would not be the same: the dit component (DiT) has the fingerprint" in error
    assert run(file, 1).parts["dit"]["fingerprint"] in error and "text" not in error
    code, said = moddiff_runs("again", 1, "--store", file)
    assert code == 2 and "other weights, or another config" in said
    code, said = moddiff_runs("again", 1, "--store", file, "--anyway")
    assert code == 1 and "other bytes (the videos differ: PSNR" in said and "the dit component" in said


def test_weights_edited_by_hand_are_known_by_their_fingerprint(folder, file):
    pipe = moddiff.load(folder)
    with torch.no_grad():
        pipe.dit.blocks[0].ffn[0].weight[0, 0] += 1
    pipe(PROMPT, **SHORT, store=file)
    assert "the dit component (DiT) has the fingerprint" in message(NotRepeatable, lambda: again(file, 1))


def test_other_versions_and_machines_are_named(folder, file, monkeypatch):
    moddiff.load(folder)(PROMPT, **SHORT, store=file)
    with closing(sqlite3.connect(file)) as db:
        record = json.loads(db.execute("select record from run").fetchone()[0])
        record["versions"]["torch"], record["machine"]["instructions"] = "1.0", "NEON"
        db.execute("update run set record = ?", (json.dumps(record),))
        db.commit()
    result = again(file, 1)
    here = torch.backends.cpu.get_cpu_capability()
    assert result.same and str(result) == "run 1 again: the same bytes"
    assert result.differs == (
        f"torch is {torch.__version__}, and was 1.0",
        f"instructions is {here}, and was NEON",
    )
    monkeypatch.setattr(experiments.repeating.Video, "__eq__", lambda *_: False, raising=True)
    assert "other bytes" in str(again(file, 1)) and "torch is" in str(again(file, 1))


class Own:
    """An encoder of the user's own, which no name stands for."""

    def __init__(self, text):
        self.text = text

    def encode(self, prompts):
        return self.text.encode(prompts)


def test_what_was_made_by_hand_is_said_plainly(folder, file, tmp_path):
    pipe = moddiff.load(folder)
    pipe.replace(text=Own(pipe.text))(PROMPT, **SHORT, store=file)
    pipe(PROMPT, **SHORT, store=file, scale=CFG(3.0, combine=rescaled(0.7)))
    with patch(pipe.dit, "blocks.0.resid_post", lambda x, where: x * 1.0):
        pipe(PROMPT, **SHORT, store=file)
    small.pipeline(tmp_path)(PROMPT, **SHORT, store=file)
    said = [message(NotRepeatable, lambda number=number: again(file, number)) for number in (1, 2, 3, 4)]
    assert (
        "run 1 cannot be made again: the text component, Own, is an object that was made by hand" in said[0]
    )
    assert "scale= was made by hand, and no JSON makes it: <function rescaled" in said[1]
    assert "it was made under a patch of blocks.0.resid_post, which is code" in said[2]
    assert "the text component, TextEncoder, is an" in said[3] and "the dit component, DiT, is an" in said[3]
    assert moddiff_runs("again", 1, "--store", file)[0] == 2


def test_a_run_that_failed_cannot_be_compared(folder, file):
    pipe = moddiff.load(folder)
    with pytest.raises(ValueError):
        pipe(PROMPT, steps=0, store=file)
    assert "run 1 cannot be made again: it failed (ValueError" in message(
        NotRepeatable, lambda: again(file, 1)
    )


# ---- recipes ----


def test_a_component_of_a_name_is_made_again_by_its_name(folder, file):
    pipe = moddiff.load(folder)
    moddiff.register("vae", "recipe-vae", lambda: pipe.vae)
    named = pipe.replace(vae="recipe-vae")
    found = recipe(named)
    assert found["parts"]["vae"]["from"] == {"named": "recipe-vae"}
    assert made(json.loads(json.dumps(found))).vae is pipe.vae
    named(PROMPT, **SHORT, store=file)
    assert again(file, 1).same


def test_a_part_that_runs_elsewhere_is_asked_there_again(folder, file):
    pipe = moddiff.load(folder)
    with serving({"text": pipe.text}) as url:
        far = pipe.replace(text=moddiff.remote(url, "text", timeout=20))
        assert far(PROMPT, **SHORT, store=file) == pipe(PROMPT, **SHORT)
        assert again(file, 1).same
    with pytest.raises(RemoteError, match=url):
        again(file, 1)


def test_parts_of_several_places_are_each_made_from_their_own(folder, tmp_path):
    other = small.release(tmp_path)
    pipe = moddiff.load(folder).replace(vae=moddiff.load(other).vae)
    found = json.loads(json.dumps(recipe(pipe)))
    assert found["parts"]["vae"]["from"]["load"] == str(other)
    assert found["parts"]["dit"]["from"]["load"] == str(folder)
    new = made(found)
    assert fingerprint(new.dit) == fingerprint(pipe.dit) and fingerprint(new.vae) == fingerprint(pipe.vae)
    assert new.defaults | {"sizes": None} == pipe.defaults | {"sizes": None}  # lists come back as tuples


def test_parts_from_single_files_are_made_from_those_files(folder):
    file = folder / "transformer" / "model.safetensors"
    pipe = moddiff.load(folder, dit=str(file))
    found = json.loads(json.dumps(recipe(pipe)))
    assert found["parts"]["dit"]["from"]["file"] == str(file)
    assert fingerprint(made(found).dit) == fingerprint(pipe.dit)


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.1, "word", (1, 2), {"a": (1.5, "b")}, UniPC(order=3), CFG((3.0, 4.0), 0.9)]
)
def test_values_that_can_be_written_come_back_equal(value):
    words = json.loads(json.dumps(plain(value)))
    assert not objects_in(words) and value_of(words) == value


@pytest.mark.parametrize(
    "guide", [CFGZero(3.0, zeros=2), APG(4.0, momentum=0.0), NAG(5.0), SkipLayer(blocks=(1,))], ids=repr
)
def test_guides_that_remember_come_back_with_their_settings(guide):
    words = json.loads(json.dumps(plain(guide)))
    assert not objects_in(words) and repr(value_of(words)) == repr(guide)


def test_values_that_cannot_be_written_say_so():
    for value in (len, object(), CFG(2.0, combine=rescaled(0.5)), {"a": [object()]}):
        assert objects_in(json.loads(json.dumps(plain(value))))


def test_an_extension_without_a_name_is_said(folder):
    from moddiff.extensions.promises import Extension, extension

    @extension
    def unnamed(part):
        return Extension(part, exact=True)

    pipe = moddiff.load(folder)
    found = recipe(pipe.replace(dit=unnamed(pipe.dit)))
    assert (
        found["parts"]["dit"]["lost"] == "the extension unnamed of the dit component has no registered name"
    )
