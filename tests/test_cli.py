"""The command line: every command on small models, and mistakes that end in one sentence and exit code 2."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image

import moddiff
from moddiff import cli, guidance, roles
from moddiff.cli import words
from moddiff.video import Video
from moddiff.weights import load

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle moving left"
SHORT = ["--frames", "5", "--size", "32x48", "--steps", "2", "--negative", ""]


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return small.release(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return small.release(tmp_path_factory.mktemp("i2v"), "i2v")


def run(*arguments):
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code


# ---- generate ----------------------------------------------------------------------------------------------


def test_a_sentence_becomes_a_file_twice_the_same(t2v, tmp_path, capsys):
    assert run("generate", PROMPT, "--model", t2v, *SHORT, "-o", tmp_path / "a.mp4") == 0
    report = capsys.readouterr()
    assert "a.mp4: 5 frames of 32 x 48, 16 a second, made in" in report.out and "seed 0" in report.out
    assert run("generate", PROMPT, "--model", t2v, *SHORT, "-o", tmp_path / "b.mp4", "--quiet") == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert Video.open(tmp_path / "a.mp4").settings["prompt"] == PROMPT
    quiet = capsys.readouterr()
    assert quiet.out == "" and quiet.err.startswith("note: the model was trained on 81 frames")
    assert quiet.err.count("\n") == 1


def test_a_bar_is_for_a_terminal_and_not_for_a_log(t2v, tmp_path, capsys, monkeypatch):
    command = ("generate", PROMPT, "--model", t2v, *SHORT, "-o", tmp_path / "out.mp4")
    assert run(*command) == 0
    assert "denoising" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(*command) == 0
    bar = capsys.readouterr().err
    assert "denoising" in bar and "2/2" in bar


def test_the_options_are_those_of_the_pipeline(t2v, tmp_path):
    assert (
        run(
            "generate",
            PROMPT,
            "--model",
            t2v,
            "--frames",
            9,
            "--size",
            "48x32",
            "--steps",
            3,
            "--negative",
            "a star",
            "--seed",
            4,
            "--solver",
            "euler",
            "--scale",
            2.5,
            "--shift",
            7,
            "--quiet",
            "-o",
            tmp_path / "out.webp",
        )
        == 0
    )
    expected = load(t2v)(
        PROMPT,
        frames=9,
        size=(48, 32),
        steps=3,
        negative="a star",
        seed=4,
        solver="euler",
        scale=2.5,
        shift=7.0,
    )
    assert (tmp_path / "out.webp").read_bytes() == expected.encode(".webp")


def test_a_picture_becomes_a_video(i2v, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)).save(
        tmp_path / "first.png"
    )
    assert (
        run(
            "generate",
            PROMPT,
            "--model",
            i2v,
            "--image",
            tmp_path / "first.png",
            *SHORT,
            "-q",
            "-o",
            tmp_path / "out.gif",
        )
        == 0
    )
    assert Video.open(tmp_path / "out.gif").frames.shape == (5, 32, 48, 3)


def test_a_picture_without_a_model_asks_for_the_image_model(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "moddiff.weights.load",
        lambda model, **_: asked.append(model) or (_ for _ in ()).throw(ValueError("enough")),
    )
    run("generate", PROMPT, "-o", tmp_path / "out.mp4")
    run("generate", PROMPT, "--image", "first.png", "-o", tmp_path / "out.mp4")
    assert asked == ["tiny-t2v", "tiny-i2v"]


def test_what_a_plugin_brings_is_called_by_name(t2v, tmp_path, monkeypatch):
    codec, longer, decoded = load(t2v).vae, "a red circle moving left on black", []
    real = codec.decode
    monkeypatch.setattr(codec, "decode", lambda latent: decoded.append(latent) or real(latent))
    for role, part in (
        ("vae", lambda: codec),
        ("guide", lambda: guidance.CFG(2.5)),
        ("rewrite", lambda: lambda prompt: longer),
    ):
        monkeypatch.setitem(roles._registered[role], "own", part)
    plugins = ("--use", "vae=own", "--scale", "own", "--rewrite", "own")
    out = tmp_path / "out.webp"
    assert run("generate", PROMPT, "--model", t2v, *SHORT, "-q", "-o", out, *plugins) == 0
    expected = load(t2v)(longer, frames=5, size=(32, 48), steps=2, negative="", scale=2.5)
    assert Video.open(out) == expected and len(decoded) == 1


@pytest.mark.parametrize("text, scale", [("5", 5.0), ("3,4.5", (3.0, 4.5)), ("own-guide", "own-guide")])
def test_a_scale_is_a_number_a_pair_or_a_name(text, scale):
    assert cli.words.scale_of(text) == scale


@pytest.mark.parametrize(
    "command, work", [("score", "moddiff.tiny.targets.main"), ("bench", "moddiff.bench.main")]
)
def test_a_file_for_figures_is_tried_before_the_work(command, work, monkeypatch, capsys):
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work was begun"))
    assert run(command, "-o", "/dev/null/figures.json") == 2
    assert "no file can be written there" in capsys.readouterr().err


def test_a_folder_that_is_not_there_yet_is_made(t2v, tmp_path):
    out = tmp_path / "films" / "today" / "out.gif"
    assert run("generate", PROMPT, "--model", t2v, *SHORT, "-q", "-o", out) == 0 and out.exists()


def test_the_home_folder_is_meant_also_where_the_shell_leaves_it(t2v, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert run("generate", PROMPT, "--model", t2v, *SHORT, "-q", "--output=~/out.webp") == 0
    assert (tmp_path / "out.webp").exists()


@pytest.mark.parametrize(
    "text, size",
    [("480x832", (480, 832)), ("832*480", (480, 832)), ("480*832", (832, 480)), ("96X64", (96, 64))],
)
def test_a_size_with_a_star_is_width_first_as_in_wans_own_scripts(text, size):
    assert cli.words.size_of(text) == size


def test_a_terminal_without_a_letter_does_not_cost_the_result(t2v, tmp_path, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert run("generate", "größer", "--model", t2v, *SHORT, "-o", tmp_path / "größer.gif") == 0
    assert Video.open(tmp_path / "größer.gif").frames.shape == (5, 32, 48, 3)
    screen.flush()
    assert b"gr\\xf6\\xdfer.gif: 5 frames" in screen.buffer.getvalue()


def test_notes_are_printed_beside_the_result(t2v, tmp_path, capsys):
    assert run("generate", "red circle " * 2000, "--model", t2v, *SHORT, "-o", tmp_path / "out.mp4") == 0
    assert "note: the prompt has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-o", "out.avi"], "error: a video cannot be saved as .avi; choose one of .mp4"),
        (["-o", "/dev/null/out.mp4"], "no file can be written there: "),
        (["--steps", "-3"], "error: steps=-3; expected at least 1"),
        (["--frames", "18"], "error: frames=18; expected 4n + 1"),
        (["--size", "95x96"], "multiples of 16 and 16, such as (96, 96)"),
        (["--size", "big"], "error: --size big; expected HEIGHTxWIDTH"),
        (["--solver", "magic"], "error: there is no solver component 'magic'"),
        (["--image", "nowhere.png"], "is a t2v model and takes no pictures"),
        (["--model", "tiny-t2w"], "error: 'tiny-t2w' is neither a folder nor a preset"),
        (
            ["--model", "wan2.1-t2v-1.3b"],
            "error: wan2.1-t2v-1.3b is known, but its weights do not come with this package; download",
        ),
        (["--height", "480"], "error: there is no option --height; here it is --size HEIGHTxWIDTH"),
        (["--num_inference_steps=4"], "error: there is no option --num-inference-steps; here it is --steps"),
        (["--size", "²x²"], "error: --size ²x²; expected HEIGHTxWIDTH"),
        (["--negative", "gr\udcf6n"], "error: the negative prompt has no letter at place 2, only part"),
        (["-o", r"C:\films\out.mp4"], r"error: C:\films\out.mp4 is a path of Windows, and this is not"),
        (["--size", "\x1b[2J"], r"error: --size \x1b[2J; expected HEIGHTxWIDTH"),
        (["--use", "umt6"], "error: --use umt6; expected ROLE=NAME, such as text=my-encoder"),
        (["--use", "unet=mine"], "error: a pipeline has no component unet"),
        (["--scale", "strong"], "error: scale='strong' is a str; expected a number such as 5.0"),
        (["--device", "toaster"], "error: device is 'toaster'; expected cpu, cuda, cuda:1 or mps"),
        (["--dtype", "int4"], "error: dtype is 'int4'; expected one of fp32, bf16, fp16"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(
    t2v, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", t2v]
    assert run("generate", PROMPT, *model, *SHORT, *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and printed.err.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_traceback_is_there_for_those_who_ask(monkeypatch, tmp_path):
    monkeypatch.setenv("MODDIFF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="cannot be saved as .avi"):
        cli.main(["generate", PROMPT, "-o", str(tmp_path / "out.avi")])


def test_a_word_that_is_no_number_is_explained(capsys):
    assert run("generate", PROMPT, "--steps", "many") == 2
    assert "--steps" in capsys.readouterr().err


def test_an_interrupt_leaves_no_half_file(t2v, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moddiff.pipeline.Pipeline.decode", interrupted)
    assert run("generate", PROMPT, "--model", t2v, *SHORT, "-o", tmp_path / "out.mp4") != 0
    assert not list(tmp_path.iterdir())


# ---- the other commands ------------------------------------------------------------------------------------


def test_inspect_lists_the_models_and_looks_into_one(t2v, capsys):
    assert run("inspect") == 0
    assert "wan2.1-t2v-1.3b" in capsys.readouterr().out
    assert run("inspect", "wan2.1-t2v-1.3b", "--size", "480x832", "--frames", 81) == 0
    assert "1,418,996,800" in capsys.readouterr().out
    assert run("inspect", t2v, "--json") == 0
    assert json.loads(capsys.readouterr().out)["task"] == "t2v"
    assert run("inspect", "wan3") == 2
    assert "neither a folder nor a preset" in capsys.readouterr().err


def test_lab_names_the_cure_when_something_is_missing(tmp_path, monkeypatch, capsys):
    assert run("lab", tmp_path) == 2
    assert "there are no notebooks in" in capsys.readouterr().err
    (tmp_path / "01.ipynb").write_text("{}")
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", None)
    assert run("lab", tmp_path) == 2
    assert "JupyterLab is not installed; run: pip install 'moddiff[notebooks]'" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """What `moddiff lab` would start JupyterLab with; it is not started."""
    commands = []
    monkeypatch.setattr("jupyterlab.labapp.main", commands.append)
    return commands


def test_lab_opens_a_lesson_and_hands_on_what_jupyter_knows(tmp_path, started):
    (tmp_path / "02 two.ipynb").write_text("{}")
    (tmp_path / "01.ipynb").write_text("{}")
    root = f"--ServerApp.root_dir={tmp_path}"
    assert run("lab", tmp_path, "--no-browser", "--port", 8890, "--ip=0.0.0.0", "--allow-root") == 0
    handed_on = ["--no-browser", "--port", "8890", "--ip=0.0.0.0", "--allow-root"]
    assert started.pop() == [root, "--LabApp.default_url=/lab/tree/01.ipynb", *handed_on]
    assert run("lab", tmp_path / "02 two.ipynb") == 0
    assert started.pop() == [root, "--LabApp.default_url=/lab/tree/02%20two.ipynb"]


def test_lab_shows_the_guides_that_the_notebooks_link_to(started):
    assert run("lab", "--no-browser") == 0
    root, first, option = started.pop()
    assert root == f"--ServerApp.root_dir={ROOT}" and (ROOT / "guides").is_dir()
    assert first == "--LabApp.default_url=/lab/tree/notebooks/01_first_video.ipynb"
    assert option == "--no-browser"


def test_training_and_scoring_hand_their_options_on(tmp_path, monkeypatch):
    given, cpu = [], torch.device("cpu")
    monkeypatch.setattr("moddiff.tiny.train.run_stage", lambda *arguments: given.append(arguments))
    options = ("--steps", 5, "--folder", tmp_path, "--seed", 3, "--workers", 2)
    assert run("train-tiny", "--stage", "vae", *options) == 0
    monkeypatch.setattr(
        "moddiff.tiny.shipping.begin_from_shipped", lambda folder: given.append(("shipped", folder))
    )
    options = ("--device", "cpu", "--batch", 256, "--seconds", 235, "--clips", 40000)
    assert run("train-tiny", "--from-shipped", "--stage", "t2v", "--folder", tmp_path, *options) == 0
    monkeypatch.setattr("moddiff.tiny.targets.main", lambda load, **options: given.append(options))
    assert run("score", "-n", 8, "-o", tmp_path / "scores.json") == 0
    assert run("score", "--model", "tiny-fast") == 0
    assert given == [
        ("vae", 5, tmp_path, 3, None, 2, cpu, None, None),
        ("shipped", tmp_path),
        ("t2v", None, tmp_path, 0, 40000, 1, cpu, 256, 235.0),
        dict(n=8, split="heldout", out=tmp_path / "scores.json", model=None),
        dict(n=256, split="heldout", out=None, model="tiny-fast"),
    ]


def test_help_and_version_answer_without_torch():
    code = (
        "import sys; from moddiff import cli; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; cli.main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"moddiff {moddiff.__version__}", done.stderr


def test_help_is_short_and_long(capsys):
    for option in ("-h", "--help"):
        assert run(option) == 0
        assert "generate" in capsys.readouterr().out
        assert run("inspect", option) == 0
        assert "--json" in capsys.readouterr().out


def test_a_shell_completes_the_commands():
    code = "import sys; sys.argv = ['moddiff']; from moddiff.cli import main; main()"
    asks = {"_MODDIFF_COMPLETE": "complete_bash", "COMP_WORDS": "moddiff gen", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asks)
    assert done.stdout.split() == ["generate"], done.stderr


def test_python_m_moddiff_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "moddiff", "generate", "x", "-o", "out.avi"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: a video cannot be saved as .avi")


# ---- import and load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user, expected",
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
    ],
    ids=str,
)
def test_threads_share_the_processor_unless_the_user_decides(user, expected):
    """OpenMP itself says, as torch loads it, how often its threads turn before they sleep."""
    surroundings = {name: os.environ[name] for name in os.environ if name[:4] not in ("GOMP", "OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", "import moddiff, torch"],
        capture_output=True,
        text=True,
        check=True,
        env=surroundings | user | {"OMP_DISPLAY_ENV": "VERBOSE"},
    )
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def test_the_names_of_the_package_are_there_and_cost_nothing_until_used():
    code = "import sys, moddiff; assert 'torch' not in sys.modules; dir(moddiff)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in dir(moddiff):
        assert getattr(moddiff, name) is not None or name == "__builtins__"
    with pytest.raises(AttributeError, match="moddiff has no 'lod'; it has load"):
        _ = moddiff.lod


def test_an_editor_sees_the_names_that_a_program_gets():
    tree = ast.parse(Path(moddiff.__file__).read_text(encoding="utf-8"))
    seen = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert {alias.name: node.module for node in seen for alias in node.names} == moddiff._NAMES


def test_a_folder_is_loaded_as_the_parts_it_holds(t2v, i2v):
    pipe = moddiff.load(t2v)
    assert pipe.task == "t2v" and pipe.image is None
    other = small.pipeline(t2v / "tokenizer")
    options = dict(steps=2, frames=5, size=(32, 48), negative="", scale=4.0, shift=3.0)
    assert np.array_equal(pipe(PROMPT, **options).frames, other(PROMPT, **options).frames)
    assert moddiff.load(str(i2v)).image is not None
    assert not any(p.requires_grad for p in pipe.dit.parameters())


def test_dtypes_are_chosen_for_all_but_the_vae_or_one_by_one(t2v):
    def dtypes(pipe):
        return {
            role: next(part.parameters()).dtype for role, part in pipe.components.items() if part is not None
        }

    half, full = torch.bfloat16, torch.float32
    assert dtypes(moddiff.load(t2v, dtype="bf16")) == {"text": half, "dit": half, "vae": full}
    assert dtypes(moddiff.load(t2v, dtype={"vae": "bf16"})) == {"text": full, "dit": full, "vae": half}
    with pytest.raises(TypeError, match="a dtype for unet; there are text, image, dit, vae"):
        moddiff.load(t2v, dtype={"unet": "bf16"})


def test_a_device_that_is_not_there_is_named(t2v, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds none on this machine"):
        moddiff.load(t2v, device={"dit": "cuda"})
    assert moddiff.load(t2v, device={"dit": "cpu"}).dit.patch_embedding.weight.device.type == "cpu"


def test_a_component_of_ones_own_is_put_in_and_the_files_left_alone(tmp_path):
    folder = small.release(tmp_path)
    for path in (folder / "transformer").iterdir():
        if path.suffix == ".safetensors":
            path.unlink()
    with pytest.raises(ValueError, match="cannot be loaded:\n- dit: "):
        moddiff.load(folder)
    mine = small.dit(seed=3)
    assert moddiff.load(folder, dit=mine).dit is mine
    with pytest.raises(TypeError, match="a component for unet"):
        moddiff.load(folder, unet=mine)


def test_a_profile_is_applied(t2v, tmp_path):
    few = ["--model", t2v, "--frames", 5, "--size", "32x32", "--steps", 1, "--quiet"]
    path = tmp_path / "out.webp"
    assert run("generate", PROMPT, *few, "--profile", "low_memory", "-o", path) == 0
    expected = load(t2v, profile="low_memory")(PROMPT, frames=5, size=(32, 32), steps=1, seed=0)
    assert path.read_bytes() == expected.save(tmp_path / "expected.webp").read_bytes()


@pytest.mark.parametrize("given, steps", [("20", 20), ("1,0.757,0.522", (1.0, 0.757, 0.522)), ("-3", -3)])
def test_steps_are_a_number_or_a_list_of_levels(given, steps):
    assert words.steps_of(given) == steps


@pytest.mark.parametrize("given", ["few", "1,a", "2.5", ""])
def test_other_steps_are_refused(given):
    with pytest.raises(ValueError, match="expected a whole number, or noise levels such as"):
        words.steps_of(given)
