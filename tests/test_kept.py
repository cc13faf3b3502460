"""Are runs found again, by number and by what is known of them, and is what differs between two all there?"""

import json

import numpy as np
import pytest
import small
from toy import message

import moddiff
from moddiff import cli
from moddiff.experiments import Store, differing, listed_runs, run, runs
from moddiff.experiments.kept import clipped, closeness
from moddiff.extensions import quantized
from moddiff.video import Video

SHORT = dict(frames=5, size=(32, 48), steps=2)


def command(*words):
    """The exit code of `moddiff runs ...`, run in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(["runs", *map(str, words)])
    return end.value.code


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A plain run, one with an extension and a long prompt, one of another model, one that fails."""
    file = tmp_path_factory.mktemp("store") / "runs.sqlite"
    pipe = moddiff.load(small.release(tmp_path_factory.mktemp("first")))
    pipe("a red circle", seed=1, **SHORT, store=file)
    quick, long = pipe.replace(dit=quantized(pipe.dit, "int8")), "a blue star " * 20
    quick(long, seed=2, **SHORT | dict(steps=1), store=Store(file))
    other = small.pipeline(tmp_path_factory.mktemp("second"))
    other("ein Kreis", seed=3, **SHORT, store=file, rewrite=lambda prompt: "a circle")
    other.vae.decode = None
    with pytest.raises(TypeError):
        other("a\nred circle", seed=4, **SHORT, store=file)
    return file


def test_runs_are_listed_the_last_first_within_the_columns(file):
    text = str(listed_runs(runs(file)))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["4", "3", "2", "1"] and lines[-1] == "4 runs"
    assert max(map(len, lines)) <= 100 and "..." in text  # the long prompt
    assert (
        "failed: TypeError" in lines[2] and "a red circle" in lines[2]
    )  # one line, whatever the prompt holds


@pytest.mark.parametrize(
    "asked, numbers",
    [
        (dict(model="small"), [4, 3]),
        (dict(model="INT8"), [2]),
        (dict(words="RED"), [4, 1]),
        (dict(words="ein kreis"), [3]),  # the prompt before it was rewritten
        (dict(words="NoneType"), [4]),  # in an error
        (dict(since="1h"), [4, 3, 2, 1]),
        (dict(since="2999-01-01"), []),
        (dict(last=2), [4, 3]),
        (dict(words="circle", model="small", last=1), [4]),
    ],
)
def test_runs_are_found_by_what_is_known_of_them(file, asked, numbers):
    assert [one.id for one in runs(file, **asked)] == numbers
    words = [asked.pop("words")] if "words" in asked else []
    options = [part for name, value in asked.items() for part in (f"--{name}", value)]
    assert command("list", *words, *options, "--store", file) == 0


def test_a_number_that_there_is_not_is_answered_with_those_there_are(file, capsys):
    assert "there is no run 9 in" in message(LookupError, lambda: run(file, 9))
    assert command("show", 9, "--store", file) == 2
    assert "there are 1 to 4" in capsys.readouterr().err
    assert "expected 1 or more" in message(ValueError, lambda: runs(file, last=0))


def test_two_runs_are_compared(file, capsys):
    table = differing(run(file, 1), run(file, 2))
    rows = {row[0]: row[1:] for row in table}
    assert rows["seed"] == ("1", "2") and rows["steps"] == ("2", "1")
    assert rows["dit"] == ("DiT", "quantized(DiT, 'int8')")
    assert {"dit fingerprint", "seconds: total", "prompt"} <= set(rows)
    assert not {"text", "vae", "vae fingerprint", "torch", "size"} & set(rows)
    assert table.caption == closeness(run(file, 1).video, run(file, 2).video)
    assert command("compare", 1, 2, "--store", file) == 0
    out = capsys.readouterr().out
    assert "quantized(DiT, 'int8')" in out and "the videos differ: PSNR" in out
    assert differing(run(file, 1), run(file, 4)).caption == "no two videos to compare"


def test_how_close_two_videos_are_is_said_in_words():
    frames = np.full((2, 4, 6, 3), 100, np.uint8)
    one, other = Video(frames), Video(frames + 5)
    assert closeness(one, Video(frames)) == "the videos are the same, frame by frame"
    assert closeness(one, other) == f"the videos differ: PSNR {10 * np.log10(255**2 / 25):.1f} dB"
    assert "of other sizes: [2, 4, 6, 3] and [1, 4, 6, 3]" in closeness(one, one[:1])
    assert closeness(one, Video(frames, 8)) == "the same frames, at 16 and 8 a second"


def test_a_run_is_shown_and_exported(file, tmp_path, capsys):
    assert command("show", 1, "--store", file) == 0
    shown = capsys.readouterr().out
    assert "run 1" in shown and "a red circle" in shown and "dit fingerprint" in shown and "torch" in shown
    assert command("show", 3, "--store", file, "--json") == 0
    third = json.loads(capsys.readouterr().out)
    assert third["run"] == 3 and third["settings"]["original_prompt"] == "ein Kreis"
    out = "-o", tmp_path / "run.json", "--video", tmp_path / "run.webp"
    assert command("export", 1, "--store", file, *out) == 0
    exported = json.loads((tmp_path / "run.json").read_text())
    assert exported["video"] == run(file, 1).digest and exported["status"] == "done"
    assert Video.open(tmp_path / "run.webp") == run(file, 1).video
    assert command("export", 4, "--store", file, "--video", tmp_path / "four.webp") == 2
    assert "run 4 failed, so it has no video" in capsys.readouterr().err


def test_the_list_is_also_json(file, capsys):
    assert command("list", "--json", "--store", file) == 0
    assert [one["run"] for one in json.loads(capsys.readouterr().out)] == [4, 3, 2, 1]


def test_generate_keeps_the_run_and_refuses_a_wrong_file_before_it_loads(tmp_path, capsys, monkeypatch):
    folder, file = small.release(tmp_path), tmp_path / "mine.sqlite"
    short = "--frames", "5", "--size", "32x48", "--steps", "1", "--model", str(folder)
    words = ["generate", "a star", *short, "-o", str(tmp_path / "a.webp"), "--store", str(file)]
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0 and "kept as run 1" in capsys.readouterr().out
    assert Video.open(tmp_path / "a.webp") == run(file, 1).video
    file.write_text("something else " * 100)
    monkeypatch.setattr("moddiff.weights.load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and "cannot hold experiments and runs" in capsys.readouterr().err


def test_a_line_is_cut_to_its_width():
    assert clipped("a\n b", 9) == "a b" and clipped("abcdefghij", 9) == "abcdef..."
