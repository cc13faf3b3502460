"""Do README, CHANGELOG, CONTRIBUTING and the workflow say what the package and its tests do?"""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import moddiff
from moddiff import cli, settings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name):
    """The lines of a page's bash blocks."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", text(name))
    return [line for block in blocks for line in block.splitlines()]


def test_every_python_that_is_claimed_is_run_by_the_workflow():
    rows = [row.rpartition(" :: ")[2] for row in PROJECT["classifiers"] if "Python :: 3." in row]
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == rows
    assert PROJECT["requires-python"] == f">={rows[0]}"
    assert f"nothing but Python {rows[0]} and pip" in text("README.md")
    assert f"on Python {rows[0]}" in text("constraints.txt")


def test_ci_checks_the_form_first_and_then_runs_the_readmes_test_command():
    steps = [line for line in text(".ci/run").splitlines() if line.startswith(("ruff", "pip"))]
    tests = 'pip install -c constraints.txt -e ".[test]" && pytest'
    assert steps[-3:] == ["ruff format --check .", "ruff check .", tests]
    assert tests in commands("README.md")
    assert "bash .ci/run" in text(".github/workflows/ci.yml")


def test_every_requirement_is_pinned():
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["notebooks"], *extras["docs"], *extras["test"]]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in asked} - {"moddiff"}
    pinned = re.findall(r"(?m)^([\w-]+)==", text("constraints.txt"))
    assert sorted(names) == sorted(pinned)


@pytest.mark.parametrize("name", ("bug", "lesson"))
def test_an_issue_begins_with_what_is_needed_to_answer_it(name):
    form = yaml.safe_load(text(f".github/ISSUE_TEMPLATE/{name}.yml"))
    asked = "\n".join(part["attributes"].get("description", "") for part in form["body"])
    assert "moddiff inspect" in asked and "moddiff.__version__" in asked


@pytest.mark.parametrize("page", ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "guides/README.md"))
def test_a_page_links_and_points_to_what_is_there(page):
    here = (ROOT / page).parent
    written = text(page)
    pages = re.findall(r"\]\((?!https?://)([^)#\s]+)", written) + re.findall(r'src="([^"]+)"', written)
    assert all((here / target).exists() for target in pages)
    named = re.findall(r"`((?:moddiff|tests|notebooks|guides)/[\w./]+\.\w+)`", written)
    there = [(ROOT / path).exists() for path in named if "NAME" not in path]  # NAME stands for any lesson
    assert all(there), named


def test_the_readme_has_every_room():
    rooms = [path for path in (ROOT / "moddiff").iterdir() if not path.name.startswith("_")]
    files = {path.name for path in rooms if path.suffix == ".py"}
    folders = {f"{path.name}/" for path in rooms if path.is_dir()}
    table = text("README.md").partition("## What is where")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+(?:\.py|/))`", table))
    assert named - {"moddiff/", "guides/", "notebooks/"} == files | folders


def test_what_moved_stands_in_the_changes():
    rows = [line.split("|") for line in text("CHANGELOG.md").splitlines() if line.startswith("| `")]
    old_names = {name for row in rows for name in re.findall(r"`([\w.]+)`", row[1])}
    assert set(moddiff._MOVED) <= old_names


def test_the_guides_page_has_every_guide_and_every_name_of_diffusers():
    page = text("guides/README.md")
    guides = {path.name for path in (ROOT / "guides").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", page)) == guides
    theirs = re.findall(r"\w+", page)
    assert not [name for name in settings.IN_DIFFUSERS if name not in theirs]


def test_an_option_that_is_named_instead_of_theirs_exists(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    there = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    for ours in cli.THEIRS.values():
        assert set(re.findall(r"--[a-z-]+", ours)) <= set(there)
    assert not set(cli.THEIRS) & set(there)
