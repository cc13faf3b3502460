"""Do the notebooks work where readers use them?  A browser opens `moddiff lab`, runs, drags and types."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("01_first_video", "03_hooks", "05_vae")
SETTINGS = {  # every cell stays in the page, and nobody asks about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}
PATIENCE = 240  # seconds, for anything that a busy machine may take long over
PROMPTS = ".jp-Notebook .jp-CodeCell .jp-InputPrompt"
TYPED = 'video = pipe("a red circle moving left on a black background", seed=0, steps=4, frames=5)'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for copies of notebooks, with the guides where they stand in the repository."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(ROOT / "guides", root / "guides")
    notebooks = root / "notebooks"
    notebooks.mkdir()
    (notebooks / "empty.ipynb").write_text(
        '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    return notebooks


def copy(name, folder):
    """A notebook without its outputs, so that whatever is shown was made in this browser."""
    book = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    book["metadata"].pop("widgets", None)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps(book), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """`moddiff lab` on a free port, with settings of its own.   -> function: notebook -> address"""
    home = tmp_path_factory.mktemp("home")
    for name, settings in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable,
        "-m",
        "moddiff",
        "lab",
        str(folder),
        "--allow-root",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
    ]
    homes = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    log = home / "jupyter.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: str(home / place) for name, place in homes.items()},
        )
    try:
        wait_until(
            lambda: (
                process.poll() is not None or answers(f"http://127.0.0.1:{port}/api/status?token={token}")
            ),
            "JupyterLab answers",
        )
        assert process.poll() is None, log.read_text()
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/notebooks/{name}.ipynb?token={token}&reset"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=10) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_until(true, what, seconds=PATIENCE):
    """The first true value of true(), which is asked again and again."""
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, f"waited {seconds} s in vain until {what}"
        time.sleep(0.2)
    return value


def status(page, wanted, seconds=PATIENCE):
    """Wait until the kernel is "busy" or "idle", as the notebook's own indicator shows it."""
    seen = f"document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === '{wanted}'"
    page.wait_for_function(seen, timeout=seconds * 1000)


def open_notebook(page, address):
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    status(page, "idle")


def run_all(page, address):
    """Open a notebook and run all its cells."""
    open_notebook(page, address)
    page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    # Not the kernel's indicator: it is idle for a moment between two cells.
    wait_until(
        lambda: all(map(has_run, page.locator(PROMPTS).all_inner_texts())) or failed(page), "all ran", 600
    )
    assert not failed(page), failed(page)


def has_run(prompt):
    return prompt.strip("[]:\u200b ").isdigit()


def failed(page):
    """The errors that cells of the page show."""
    return page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()


def saved(page, path):
    """The notebook as the browser saves it."""
    before = path.stat().st_mtime_ns
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    wait_until(lambda: path.stat().st_mtime_ns > before, f"{path.name} is saved", 60)
    return json.loads(path.read_text(encoding="utf-8"))


def pictures(cell):
    """The pictures and videos that a cell shows, as their embedded data."""
    outputs = cell.locator(".jp-OutputArea-output")
    # A video holds a picture for pages that cannot play it; it is not shown here.
    return outputs.locator("img:not(video img), video").evaluate_all("all => all.map(one => one.src)")


def type_cell(page, source):
    """Type a new cell below all others and run it.   -> the cell"""
    count = page.locator(".jp-Notebook .jp-CodeCell").count()
    page.locator(".jp-Notebook .jp-Cell .jp-InputPrompt").last.click()  # command mode: letters are commands
    page.keyboard.press("b")
    wait_until(
        lambda: page.locator(".jp-Notebook .jp-CodeCell").count() == count + 1, "there is a new cell", 60
    )
    cell = page.locator(".jp-Notebook .jp-CodeCell").nth(
        count
    )  # not .last, which would soon mean another cell
    cell.locator(".cm-content").click()
    page.keyboard.insert_text(source)
    page.keyboard.press("Control+Enter")
    wait_until(
        lambda: has_run(cell.locator(".jp-InputPrompt").inner_text()),
        "the new cell has run",
    )
    assert "Error:" not in cell.locator(".jp-OutputArea").inner_text(), cell.inner_text()
    return cell


def drag(page, handle):
    """Drag a slider's handle: to the right end, or to the left one where it stands to the right."""
    handle.scroll_into_view_if_needed()
    knob, track = (
        handle.bounding_box(),
        handle.locator("xpath=ancestor::*[contains(@class, 'noUi-base')]").bounding_box(),
    )
    x, y = knob["x"] + knob["width"] / 2, knob["y"] + knob["height"] / 2
    left_half = x < track["x"] + track["width"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * (0.9 if left_half else 0.1), y, steps=12)
    page.mouse.up()


def test_a_link_to_a_guide_opens_the_guide(server, page, folder):
    copy("01_first_video", folder)
    open_notebook(page, server("01_first_video"))
    link = page.locator(".jp-MarkdownOutput a[href*='guides/pipeline.md']").first
    link.scroll_into_view_if_needed()
    link.click()
    title = page.locator(".lm-TabBar-tabLabel").filter(has_text="pipeline.md")
    wait_until(lambda: title.count(), "the guide has a tab of its own", 60)
    assert not page.locator(".jp-Dialog").count(), "JupyterLab says that it could not open something"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_all_cells_run_and_a_dragged_slider_changes_its_picture(name, server, page, folder):
    path = copy(name, folder)
    run_all(page, server(name))
    book = saved(page, path)
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not [
        cell["outputs"]
        for cell in code
        if any(output["output_type"] == "error" for output in cell["outputs"])
    ]
    assert all(cell["execution_count"] for cell in code)

    handle = page.locator(".noUi-handle:visible").first
    cell = page.locator(".jp-Notebook .jp-CodeCell").filter(has=page.locator(".noUi-handle:visible")).first
    before = pictures(cell)
    assert before, "a slider without a picture"
    drag(page, handle)
    wait_until(lambda: (now := pictures(cell)) and now != before, "the picture follows the slider", 120)

    if name == "03_hooks":
        patch_and_back(page)


def patch_and_back(page):
    """A patch typed into a cell changes the video; without it the video is what it was, to the last bit."""
    type_cell(page, 'import moddiff; from IPython.display import display; pipe = moddiff.load("tiny")')
    first = type_cell(page, f"{TYPED}; first = video; display(video)")
    patched = type_cell(
        page,
        f'with moddiff.patch(pipe.dit, "blocks.*.cross_attn.out", lambda x, where: 0 * x): {TYPED}\n'
        "changed = video; display(video)",
    )
    again = type_cell(
        page, f"{TYPED}; display(video); print('patched:', changed == first, 'plain:', video == first)"
    )
    assert "patched: False plain: True" in again.inner_text()
    shown = [pictures(cell) for cell in (first, patched, again)]
    assert len(shown[0]) == 1 and shown[0] == shown[2] != shown[1]
    playing = "video => video.readyState >= 2 && video.videoWidth > 0"
    wait_until(lambda: first.locator("video").evaluate(playing), "the video plays")


# ---- a page of our own: a slider, a stop, a prediction, a checker ----

CONTROLS = (
    """
import moddiff
from moddiff import checks, viz

pipe = moddiff.load("tiny")
prompt = "a red circle moving left on a black background"
""",
    """
def belief(scale):
    state = next(pipe.steps(prompt, seed=0, scale=scale))
    return viz.frame_sheet(pipe.decode(state.x0)[::4], title=f"scale {scale}")

one_step = viz.live(belief, scale=range(1, 9))
one_step
""",
    """
def film(steps):  # nobody waits for the end of the long ones
    return viz.frame_sheet(pipe(prompt, seed=0, steps=steps), title=f"{steps} steps")

whole_run = viz.live(film, steps=[1, 900, 950, 1000])
whole_run
""",
    """
guess = None
checks.reveal("07.2", guess)
""",
    """
def my_attention(q, k, v, mask):
    ...

checks.attention(my_attention)
""",
)
RIGHT_ATTENTION = """
def my_attention(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -float("inf")).softmax(-1).nan_to_num() @ v

checks.attention(my_attention)
"""


@pytest.fixture(scope="module")
def own_page(browser, server, folder):
    """A page of our own with all its cells run."""
    cells = [
        dict(
            cell_type="code",
            id=f"cell-{i}",
            metadata={},
            source=source.strip(),
            outputs=[],
            execution_count=None,
        )
        for i, source in enumerate(CONTROLS)
    ]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    book = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    (folder / "controls.ipynb").write_text(json.dumps(book), encoding="utf-8")
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.set_default_timeout(PATIENCE * 1000)
    run_all(page, server("controls"))
    yield page
    page.close()


def cell_of(page, number):
    return page.locator(".jp-Notebook .jp-CodeCell").nth(number)


def told(page, line):
    """What a line of Python prints in the page's kernel."""
    return shown_below(type_cell(page, line))


def shown_below(cell):
    """The words of a cell's outputs, without their prompt."""
    return "\n".join(cell.locator(".jp-OutputArea-output").all_inner_texts()).strip()


def test_the_picture_of_one_step_follows_its_slider(own_page):
    cell = cell_of(own_page, 1)
    handle, before = cell.locator(".noUi-handle"), pictures(cell)
    assert len(before) == 1
    drag(own_page, handle)
    wait_until(lambda: pictures(cell) not in ([], before), "the picture follows the slider")
    shown = cell.locator(".widget-readout").inner_text()
    # The last picture is that of the place where the hand came to rest, whatever was drawn on the way.
    assert told(own_page, "one_step.wait(); print(one_step.now)") == f"{{'scale': {shown}}}" and shown != "1"
    assert len(pictures(cell)) == 1


def test_a_run_shows_how_far_it_is_and_ends_when_stop_is_pressed(own_page):
    cell = cell_of(own_page, 2)
    handle, before = cell.locator(".noUi-handle"), pictures(cell)
    button = cell.locator("button:visible", has_text="Stop")
    assert len(before) == 1 and not button.count()
    drag(own_page, handle)
    button.wait_for()
    wait_until(
        lambda: "of " in cell.locator(".widget-label:visible").last.inner_text(), "it counts the steps"
    )
    assert told(own_page, "print('the kernel answers')") == "the kernel answers"
    button.click()
    wait_until(lambda: "stopped" in cell.inner_text(), "the run has ended")
    wait_until(lambda: cell.locator(".widget-readout").inner_text() == "1", "the slider is back")
    assert pictures(cell) == before and not button.count()
    assert told(own_page, "from moddiff.hooks import live_handles; print(whole_run.now, live_handles())") == (
        "{'steps': 1} []"
    )


def test_a_prediction_gives_nothing_away_before_a_guess(own_page):
    asked = shown_below(cell_of(own_page, 3))
    assert "commit to a guess first" in asked
    right = answers_of("07.2")["right"]
    wrong = "a" if right != "a" else "b"
    for guess, begins in ((wrong, "not yet: "), (right, "right: ")):
        said = told(own_page, f"checks.reveal('07.2', {guess!r})")
        assert said.startswith(begins) and answers_of("07.2")[guess] in said
        assert answers_of("07.2")[guess] not in asked


def test_a_checker_tells_a_right_answer_from_a_wrong_one(own_page):
    assert "not attempted" in shown_below(cell_of(own_page, 4))
    wrong = RIGHT_ATTENTION.replace(" / q.shape[-1] ** 0.5", "")
    assert told(own_page, wrong.strip()).startswith("not yet: ")
    assert told(own_page, RIGHT_ATTENTION.strip()).startswith("right: ")


def answers_of(prediction):
    """A prediction's right letter and explanations, as they lie in the library."""
    lesson = next((ROOT / "moddiff" / "checks" / "answers").glob(f"{prediction[:2]}_*.json"))
    return json.loads(lesson.read_text(encoding="utf-8"))[prediction]
