"""Does a package that somebody else wrote add parts by their names, and is a bad one told from a good one?"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from moddiff import roles
from moddiff.roles import ContractError, component_for, get, names, register

HERE = Path(__file__).parent / "plugin"
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package, built from a copy and installed by pip: the environment in which programs find it."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(HERE, source, ignore=shutil.ignore_patterns("__pycache__"))
    options = "--no-deps", "--no-build-isolation", "--no-index", "--quiet"
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", target, source]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (target / "moddiff_sketches.py").exists()
    paths = [str(target), str(HERE.parents[1])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


def program(environment, *words):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)


FROM_PYTHON = """
import json, sys, moddiff
from moddiff_sketches import Adams, Spelled, damped, on_black
from moddiff.roles import apply, names
folder = sys.argv[1]
assert {"spelled"} <= set(names("text")) and {"adams"} <= set(names("solver"))
plain, few = moddiff.load("tiny"), dict(seed=0, steps=2)

by_name = plain.replace(text="spelled", dit=apply(plain.dit, [["damped", {"strength": 0.8}]]))
by_hand = plain.replace(text=Spelled(), dit=damped(plain.dit, strength=0.8))
video = by_name("a red circle", solver="adams", rewrite="on-black", **few, store=folder + "/runs.sqlite")
assert video.settings["prompt"] == "a red circle on a black background"
assert video == by_hand("a red circle on a black background", solver=Adams(), **few)
assert video != plain("a red circle on a black background", **few)

calls = {"text": "spelled", "solver": "adams", "dit": [["damped", {"strength": 0.8}]]}
with open(folder + "/mine.json", "w") as file:
    json.dump(calls, file)
for which in (calls, folder + "/mine.json"):
    assert moddiff.load("tiny", profile=which)("a red circle", rewrite="on-black", **few) == video
video.save(folder + "/python.webp")
"""


def test_its_parts_are_used_by_name_from_python_profile_and_command_line(installed, tmp_path):
    done = program(installed, "-c", FROM_PYTHON, tmp_path)
    assert done.returncode == 0, done.stderr
    common = "-m", "moddiff", "generate", "a red circle", "--steps", 2, "-q", "--rewrite", "on-black"
    (tmp_path / "extension.json").write_text(json.dumps({"dit": [["damped", {"strength": 0.8}]]}))
    options = "--use", "text=spelled", "--solver", "adams", "--profile", tmp_path / "extension.json"
    for name, how in (("options", options), ("profile", ("--profile", tmp_path / "mine.json"))):
        out = tmp_path / f"{name}.webp"
        done = program(installed, *common, *how, "-o", out)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == (tmp_path / "python.webp").read_bytes()


def test_a_run_with_its_parts_is_made_again_where_it_is_installed_and_refused_where_not(installed, tmp_path):
    done = program(installed, "-c", FROM_PYTHON, tmp_path)
    assert done.returncode == 0, done.stderr
    again = "-m", "moddiff", "runs", "again", 1, "--store", tmp_path / "runs.sqlite"
    done = program(installed, *again)
    assert (done.returncode, done.stdout) == (0, "run 1 again: the same bytes\n"), done.stderr
    done = program(installed | {"PYTHONPATH": str(HERE.parents[1])}, *again)
    assert done.returncode == 2 and "there is no text component 'spelled'" in done.stderr


# ---- bad ones ----


def entries(monkeypatch, *found):
    """As if packages were installed, each with one entry: (package, group, name, value)."""

    class FromPackage(EntryPoint):
        dist = property(lambda self: SimpleNamespace(name=packages[self.name, self.value]))

    packages = {(name, value): package for package, _, name, value in found}
    made = [FromPackage(name, value, group) for _, group, name, value in found]
    monkeypatch.setattr(roles, "entry_points", lambda group: [one for one in made if one.group == group])


def test_an_entry_that_does_not_import_names_its_package(monkeypatch, tmp_path):
    (tmp_path / "half_written.py").write_text("def broken(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries(
        monkeypatch,
        ("gone-package", "moddiff.components", "text.gone", "no_such_module_anywhere:Thing"),
        ("half-package", "moddiff.extensions", "half", "half_written:broken"),
        ("less-package", "moddiff.components", "solver.less", "collections:NoSuchThing"),
    )
    for role, name in (("text", "gone"), ("extension", "half"), ("solver", "less")):
        with pytest.raises(ContractError, match=f"'{name}' of the installed package {name}-package cannot"):
            get(role, name)


def test_an_entry_of_the_wrong_role_names_its_package(monkeypatch):
    entries(monkeypatch, ("odd-package", "moddiff.components", "solver.counter", "collections:Counter"))
    with pytest.raises(ContractError, match="cannot play the role 'solver'.*installed package odd-package"):
        component_for("solver", "counter")
    entries(monkeypatch, ("odd-package", "moddiff.components", "sampler.mine", "collections:Counter"))
    with pytest.raises(ValueError, match=r"no solver component 'mine'.*odd-package has sampler\.mine"):
        get("solver", "mine")


def test_an_extension_that_is_no_function_names_its_package(monkeypatch):
    entries(monkeypatch, ("odd-package", "moddiff.extensions", "number", "string:digits"))
    with pytest.raises(ContractError, match="extension 'number'.*odd-package.*is a str; expected a function"):
        get("extension", "number")


def test_a_name_that_two_bring_is_refused_when_it_is_asked_for(monkeypatch):
    entries(
        monkeypatch,
        ("one-package", "moddiff.components", "text.twice", "collections:OrderedDict"),
        ("other-package", "moddiff.components", "text.twice", "collections:Counter"),
        ("bold-package", "moddiff.components", "solver.unipc", "collections:Counter"),
        ("bold-package", "moddiff.components", "text.fine", "collections:Counter"),
    )
    with pytest.raises(ContractError, match="one-package and other-package both bring a text component"):
        get("text", "twice")
    with pytest.raises(ContractError, match="bold-package brings a solver component 'unipc', which is ours"):
        get("solver", "unipc")
    assert {"twice", "fine"} <= set(names("text")) and get("text", "fine")
    with pytest.raises(ValueError, match="there already is a text component 'fine', of the installed"):
        register("text", "fine", Path)


def test_one_package_that_is_found_twice_on_the_path_does_not_collide(monkeypatch):
    entry = ("one-package", "moddiff.components", "text.once", "collections:Counter")
    entries(monkeypatch, entry, entry)
    assert get("text", "once").__name__ == "Counter"
