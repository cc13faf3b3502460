"""Is the library laid out as a reader expects?  One question a file, dependencies one way, a test each."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moddiff"
FILES = sorted(PACKAGE.rglob("*.py"))
# Dotted name in the package -> file; the front of a room has the room's name: "hooks", beside "hooks.tap".
NAMES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}
ROOMS = {name for name in NAMES if "." not in name} - {"__init__", "__main__"}

MODELS = {"attention", "rope", "text", "image", "dit", "vae", "vace", "experts"}
FOUNDATIONS = MODELS | {"linear", "storage", "hooks", "flow", "solvers", "guidance"}
ABOVE = {"pipeline", "roles", "extensions", "weights", "tracing", "viz", "experiments", "cli", "bench"}
ABOVE |= {"goals"}
LESSONS = {  # module: notebook; the guide has the module's name
    "pipeline": "01_first_video",
    "attention": "02_attention",
    "hooks": "03_hooks",
    "text": "04_text",
    "vae": "05_vae",
    "flow": "06_flow",
    "dit": "07_dit",
    "rope": "08_rope",
    "solvers": "09_solvers",
    "guidance": "10_guidance",
    "image": "11_image",
    "rewrite": "12_rewrite",
    "weights": "13_weights",
    "tracing": "14_tracing",
    "extensions.lora": "15_lora",
    "extensions.quantize": "16_quantize",
    "extensions.offload": "17_offload",
    "extensions.cache": "18_cache",
    "extensions.compile": "19_compile",
    "extensions.windows": "20_windows",
    "remote": "21_remote",
    "extensions.parallel": "22_parallel",
    "tiny": "23_training",
}
GUIDES = {"tiny": "training"}  # where the guide, and the checker, has another name than the module


def imports(path):
    """Modules of ours that a file imports, at its top or inside a function."""
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            parts = (*base, *node.module.split(".")) if node.module else base
            named = {".".join((*parts, alias.name)) for alias in node.names}
            found |= (named & set(NAMES)) or {".".join(parts)}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            whole = (
                [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            )
            found |= {name.removeprefix("moddiff.") for name in whole if name.startswith("moddiff.")}
    return found & set(NAMES)


def room(name):
    return name.split(".")[0]


def rooms_below(first):
    """Every room that a room needs, directly or through others."""
    reached, todo = set(), [first]
    while todo:
        here = todo.pop()
        new = {
            room(needed) for name in NAMES if room(name) == here for needed in imports(NAMES[name])
        } - reached
        todo += new
        reached |= new
    return reached - {first}


def foreign(path):
    """Top-level packages of others that a file imports when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_no_file_needs_itself_however_late_it_imports():
    order = TopologicalSorter({name: imports(path) - {name} for name, path in NAMES.items()})
    assert set(order.static_order()) >= ROOMS


def test_no_room_needs_itself_through_another():
    graph = {
        here: {room(needed) for name in NAMES if room(name) == here for needed in imports(NAMES[name])}
        for here in ROOMS
    }
    order = TopologicalSorter({here: needed - {here} for here, needed in graph.items()})
    assert set(order.static_order()) >= ROOMS


def test_a_file_of_a_room_does_not_come_in_by_the_front_door():
    for name, path in NAMES.items():
        if "." in name:
            assert room(name) not in imports(path), f"{name} imports its own room; import the file beside it"


@pytest.mark.parametrize("name", sorted(FOUNDATIONS & set(NAMES)))
def test_what_a_pipeline_is_made_of_does_not_know_the_pipeline(name):
    assert not rooms_below(name) & ABOVE


def test_hooks_know_no_model():
    assert rooms_below("hooks") == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_begins_with_its_question_and_fits_one_sitting(path):
    text = path.read_text(encoding="utf-8")
    summary = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    if path.parent != PACKAGE or path.name not in ("__init__.py", "__main__.py"):
        assert "?" in summary, f"{path.name} does not say which question it answers"
    assert text.count("\n") <= 450
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")


def test_no_line_is_wider_than_the_eye():
    for path in [path for folder in ("moddiff", "tests", "guides") for path in (ROOT / folder).rglob("*.py")]:
        wide = [
            i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 110
        ]
        assert not wide, f"{path.relative_to(ROOT)}: lines over 110 columns: {wide[:5]}"


@pytest.mark.parametrize("command", (("check",), ("format", "--check")), ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_moddiff_brings_in_no_oracle_no_plotting_and_no_torch():
    heavy = ("torch", "diffusers", "transformers", "matplotlib", "ipywidgets")
    code = f"import sys, moddiff, moddiff.cli; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_module_that_moved_is_still_found_under_its_old_name():
    code = """
import moddiff, sys
from importlib import import_module
for old, new in moddiff._MOVED.items():
    found = import_module("moddiff." + old)
    assert found is getattr(moddiff, old) is sys.modules["moddiff." + new], old
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_needs_an_oracle_or_an_extra_to_be_imported(path):
    extras = {
        "diffusers",
        "transformers",
        "matplotlib",
        "ipywidgets",
        "flash_attn",
        "mlx",
        "mlx_lm",
        "httpx",
        "jupyterlab",
        "gguf",
        "comfy_kitchen",
        "sentencepiece",
        "opentelemetry",
        "google",
        "fastapi",
        "starlette",
        "uvicorn",
        "ray",
    }
    assert not foreign(path) & extras


# Files whose tests stand in the file of another module.
TESTED_WITH = {  # a test file: the modules it has beside, or whole rooms of them
    "cli": ("cli",),
    "bench": ("goals",),
    "guidance": ("free", "inside", "relatives"),
    "quantize": ("dynamic", "encoders"),
    "offload": ("pages",),
    "cache": ("cache_policies", "cache_coefficients", "cache_calibration"),
    "building": ("complaints",),
    "fit": ("working",),
    "configs": ("dialects", "fields"),
    "files": ("formats",),
    "parallel": ("ranks",),
    "pipeline": ("loading", "conditioning", "run", "settings", "tokens"),
    "roles": ("contracts",),
    "video": ("pictures", "saving"),
    "keeping": ("ledger", "asking"),
    "repeating": ("recipes",),
    "sessions": ("tap",),
    "stages": ("codec_stages", "dit_stages", "encoder_stages", "training_set"),
    "extensions": (
        "promises",
        "memory",
    ),
    "lora": ("lora_families", "lora_files", "lora_head", "lora_layers"),
    "dit": ("arguments", "vace", "experts", "block"),
    "vae": ("config", "causal", "layers", "model"),
    "storage": ("stored", "scaled", "blocks"),
    "streaming": ("stream",),
    "windows": ("schedules",),
    "world": ("words",),
    "telemetry": ("spans", "recording", "otlp", "logs"),
    "cluster": ("actors", "crew", "many", "starting", "worker"),
    "remote": (
        "branches",
        "client",
        "components",
        "encodings",
        "looking",
        "served",
        "server",
        "wire",
        "work",
    ),
    "rewrite": ("answers", "chat", "form", "wishes", "instructions", "local"),
}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"__init__", "__main__"}))
def test_every_module_has_its_tests(name):
    if NAMES[name].name == "__init__.py":
        return
    room, stem = name.split(".")[0], name.split(".")[-1]
    home = next((home for home, known in TESTED_WITH.items() if {room, stem} & set(known)), stem)
    assert (ROOT / "tests" / f"test_{home}.py").exists()


@pytest.mark.parametrize("module", LESSONS)
def test_every_module_of_the_table_has_its_notebook_and_its_guide(module):
    guide = ROOT / "guides" / f"{guide_of(module)}.md"
    assert (ROOT / "notebooks" / f"{LESSONS[module]}.ipynb").exists() and guide.exists()


def guide_of(module):
    return GUIDES.get(module, module.split(".")[-1])


def test_no_notebook_or_guide_stands_without_its_module():
    assert set(LESSONS) <= set(NAMES)
    extra = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - set(LESSONS.values())
    assert not {stem for stem in extra if not stem.startswith("examples_")}
    guides = {path.stem for path in (ROOT / "guides").glob("*.md")}
    apart = {"README", "full_size", "telemetry", "scale", "streaming", "compile", "kernels"}
    known = {guide_of(module) for module in LESSONS} | apart
    assert guides <= known


def test_no_tracked_text_names_a_machine_path_or_a_loose_load():
    words = ("strict=" + "False", "except " + "Exception", "weights_only=" + "False")
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path.name
