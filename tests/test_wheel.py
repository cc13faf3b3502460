"""Does what is installed work without the repository?  A wheel and a source distribution, built and tried."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools.build_meta import build_sdist, build_wheel; build_sdist({0!r}); build_wheel({0!r})"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with moddiff-*.whl and moddiff-*.tar.gz, built from a copy: setuptools leaves litter."""
    copy, folder = tmp_path_factory.mktemp("copy") / "moddiff", tmp_path_factory.mktemp("dist")
    leave_out = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "runs")
    shutil.copytree(ROOT, copy, ignore=leave_out)
    for hidden in (".ci", ".binder", ".github"):
        shutil.copytree(ROOT / hidden, copy / hidden)
    code = BUILD.format(str(folder))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        yield archive


def files(folder, *patterns):
    """Paths below a folder of the repository, relative to the repository."""
    return {
        path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / folder).rglob(pattern)
    }


def test_a_wheel_holds_code_weights_presets_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = files("moddiff", "*.py", "py.typed")
    data = files("moddiff/tiny", "weights/*", "CARD.md") | files("moddiff/weights/presets", "*.json")
    data |= files("moddiff/checks/answers", "*.json") | files("moddiff/extensions/calibrations", "*.json")
    assert {"moddiff/tiny/weights/t2v.safetensors", "moddiff/weights/presets/tiny-t2v.json"} <= data
    assert held == code | data


def test_a_wheel_says_what_an_index_asks_for(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    told = Parser().parsestr(wheel.read(name).decode())
    assert told["License-Expression"] == "Apache-2.0" and told["License-File"] == "LICENSE"
    assert told["Author"] == "The moddiff authors" and told["Keywords"]
    assert told["Requires-Python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in told.get_all("Classifier")


def test_the_wheel_makes_a_video_in_an_empty_folder(built, tmp_path):
    library = tmp_path / "library"
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(library)
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(library)!r}); import moddiff.cli; "
        f"assert moddiff.cli.__file__.startswith({str(library)!r}); "
        "moddiff.cli.main(['generate', 'a red circle moving left', '--steps', '2', '--frames', '5'])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in empty.iterdir()] == ["out.mp4"]


def test_a_source_distribution_holds_what_its_tests_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "notebooks", "guides"):
        wanted = files(
            folder, "*.py", "*.ipynb", "*.md", "*.json", "*.safetensors", "*.gz", "*.cfg", "*.webp"
        )
        assert not {name for name in wanted if "/." not in name} - held
    assert {"constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".ci/run"} <= held
    assert {"mkdocs.yml", ".binder/requirements.txt", ".github/workflows/pages.yml"} <= held
    assert not [name for name in held if name.endswith((".pyc", ".sqlite"))]
