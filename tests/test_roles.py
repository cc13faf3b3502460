"""Can every role be filled by name or by a wrapper, and is a broken promise caught where it meets the next
component?"""

from importlib.metadata import EntryPoint

import numpy as np
import pytest
import small
import torch

from moddiff import capture, patch, roles
from moddiff.experts import Experts
from moddiff.guidance import CFG
from moddiff.roles import (
    ContractError,
    check_component,
    checked,
    component_for,
    device_of,
    fact,
    get,
    names,
    register,
)
from moddiff.solvers import DPMSolverPP, Euler, UniPC


class Words:
    """A text encoder of three lines."""

    def encode(self, prompts):
        return [torch.zeros(len(prompt.split()), 8) for prompt in prompts]


@pytest.fixture(autouse=True)
def registry_as_it_was(monkeypatch):
    monkeypatch.setattr(
        roles, "_registered", {role: dict(found) for role, found in roles._registered.items()}
    )


def installed(monkeypatch, *entries):
    monkeypatch.setattr(
        roles, "entry_points", lambda group: [EntryPoint(name, value, group) for name, value in entries]
    )


def broken(*arguments, **expected):
    with pytest.raises(ContractError) as error:
        checked(*arguments, **expected)
    return str(error.value)


# The registry.


def test_what_is_registered_can_be_asked_for():
    register("text", "words", Words)
    assert get("text", "words") is Words and "words" in names("text")


def test_registering_works_as_a_decorator():
    @register("rewrite", "louder")
    def louder(prompt):
        return prompt.upper()

    assert get("rewrite", "louder")("hi") == "HI" and louder("a") == "A"


def test_the_built_in_components_have_names():
    assert get("solver", "unipc") is UniPC and get("guide", "cfg") is CFG
    for role in roles.ROLES:
        for name in roles.BUILT_IN[role]:
            assert check_component(role, component_for(role, name))
    assert all(callable(get("extension", name)) for name in roles.BUILT_IN["extension"])


def test_a_cell_run_twice_replaces_its_own_component_but_not_another_one():
    def make():
        def mine(prompt):
            return prompt

        return mine

    first, second = register("rewrite", "mine", make()), register("rewrite", "mine", make())
    assert first is not second and get("rewrite", "mine") is second
    with pytest.raises(
        ValueError, match="there already is a rewrite component 'mine'.*choose another name for Words"
    ):
        register("rewrite", "mine", Words)
    with pytest.raises(ValueError, match="there already is a solver component 'unipc'"):
        register("solver", "unipc", Words)


def test_an_installed_package_adds_a_component_through_its_entry_point(monkeypatch):
    installed(
        monkeypatch, ("text.dotted", "collections:OrderedDict"), ("solver.other", "collections:Counter")
    )
    from collections import OrderedDict

    assert (
        get("text", "dotted") is OrderedDict and "dotted" in names("text") and "dotted" not in names("solver")
    )


def test_an_entry_point_that_cannot_be_imported_is_named(monkeypatch):
    installed(monkeypatch, ("text.gone", "no_such_module_anywhere:Thing"))
    with pytest.raises(
        ContractError, match="text component 'gone' .* cannot be imported.*no_such_module_anywhere:Thing"
    ):
        get("text", "gone")


def test_unknown_roles_and_names_are_answered_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match="there is no role 'sampler'; the roles are text, image, dit, vae, solver, guide, rewrite",
    ):
        register("sampler", "x", Words)
    with pytest.raises(
        ValueError, match="there is no solver component 'unipcc'; did you mean 'unipc'?.*moddiff.register"
    ):
        get("solver", "unipcc")


# The promise, before anything runs.


def test_a_component_with_the_methods_of_its_role_passes():
    words = Words()
    assert check_component("text", words) is words
    assert check_component("dit", lambda x, t, text: x)


def test_the_roles_are_found_where_components_are():
    for name, role in roles.ROLES.items():
        assert getattr(roles, role.__name__) is role and f'Role "{name}"' in role.__doc__
        assert all(getattr(role, method).__doc__ for method in roles.METHODS[name])


def test_a_component_without_them_is_told_which_and_what_they_do():
    with pytest.raises(
        ContractError,
        match=r"Words cannot play the role 'vae': it lacks decode\(\).*decode: \[b, z, f, h, w\] ->",
    ):
        check_component("vae", Words())
    with pytest.raises(
        ContractError, match="Words cannot play the role 'text': it is a class; make one first"
    ):
        check_component("text", Words)


# The promise, where outputs arrive.


def test_outputs_that_keep_the_promise_pass_untouched():
    words, x = Words(), torch.zeros(1, 4, 2, 3, 5)
    out = words.encode(["a b", "c"])
    assert checked("text", words, out, prompts=2, dim=8) is out
    assert checked("image", None, torch.zeros(2, 5, 8), batch=2, dim=8).shape == (2, 5, 8)
    assert checked("dit", None, x, shape=x.shape) is x
    assert checked("solver", None, (x, None), shape=x.shape)[0] is x
    assert checked("guide", None, x.double(), shape=x.shape).dtype == torch.float64
    assert checked("rewrite", None, "a prompt") == "a prompt"
    assert checked("vae", None, x.to("meta"), "decode", shape=x.shape).is_meta


@pytest.mark.parametrize(
    "role, output, expected, words",
    [
        (
            "text",
            torch.zeros(2, 3, 8),
            dict(prompts=2),
            "Words.encode returned a tensor [2, 3, 8] of float32; expected a list with one [l, d] per prompt",
        ),
        (
            "text",
            [torch.zeros(3, 8)],
            dict(prompts=2),
            "returned a list of 1; expected 2, one [l, d] per prompt",
        ),
        (
            "text",
            [torch.zeros(3, 8)],
            dict(prompts=1, dim=16),
            "a tensor [3, 8] of float32; expected a floating tensor [l, 16]",
        ),
        (
            "text",
            [torch.zeros(0, 8)],
            dict(prompts=1),
            "a tensor [0, 8] of float32; expected a floating tensor [l, d]",
        ),
        (
            "text",
            [None],
            dict(prompts=1),
            "None; expected a floating tensor [l, d]. Did it forget to return?",
        ),
        (
            "image",
            torch.zeros(5, 8),
            dict(batch=1, dim=8),
            "a tensor [5, 8] of float32; expected a floating tensor [1, n, 8]",
        ),
        (
            "dit",
            torch.zeros(1, 4, 2, 3, 5),
            dict(shape=(1, 16, 2, 3, 5)),
            "a tensor [1, 4, 2, 3, 5] of float32; expected a floating tensor [1, 16, 2, 3, 5]",
        ),
        (
            "dit",
            torch.zeros(1, 4, 2, 3, 5).long(),
            dict(shape=(1, 4, 2, 3, 5)),
            "a tensor [1, 4, 2, 3, 5] of int64; expected a floating tensor",
        ),
        (
            "solver",
            torch.zeros(1, 4),
            dict(shape=(1, 4)),
            "expected the pair (x, memory). Did the step forget its memory?",
        ),
        (
            "solver",
            (torch.zeros(1, 4), None),
            dict(shape=(1, 5)),
            "a tensor [1, 4] of float32; expected a floating tensor [1, 5]",
        ),
        (
            "guide",
            None,
            dict(shape=(1, 5)),
            "None; expected a floating tensor [1, 5]. Did it forget to return?",
        ),
        ("rewrite", "  ", {}, "'  '; expected a prompt that is not empty"),
        ("rewrite", None, {}, "None; expected a prompt that is not empty"),
    ],
)
def test_a_broken_promise_names_the_role_what_came_and_what_was_expected(role, output, expected, words):
    said = broken(role, Words(), output, **expected)
    assert (
        f"the {role} component broke its contract" in said and words in said and "The role promises" in said
    )


def test_values_that_are_not_numbers_are_caught_and_the_search_can_be_left_out():
    bad = torch.tensor([[[[[float("nan")]]]]])
    said = broken("vae", Words(), bad, "decode", shape=(1, 1, 1, 1, 1))
    assert "Words.decode returned NaN or infinite values" in said and "float16" in said
    assert checked("vae", Words(), bad, "decode", shape=(1, 1, 1, 1, 1), finite=False) is bad


def test_the_package_s_own_components_keep_their_own_promises():
    from moddiff.weights import build

    dit = build(
        "dit",
        dict(
            model_type="t2v",
            in_dim=4,
            dim=16,
            ffn_dim=24,
            freq_dim=8,
            text_dim=8,
            out_dim=4,
            num_heads=2,
            num_layers=1,
            text_len=16,
        ),
    )
    vae = build("vae", dict(dim=4, z_dim=16, num_res_blocks=1))
    image = build(
        "image", dict(image_size=8, patch_size=4, dim=8, mlp_ratio=2, out_dim=6, num_heads=2, num_layers=2)
    )
    for role, component in (("dit", dit), ("vae", vae), ("image", image), ("solver", UniPC())):
        check_component(role, component)
    x = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        velocity = checked("dit", dit, dit(x, torch.tensor([500.0]), Words().encode(["a b"])), shape=x.shape)
        z = checked("vae", vae, vae.encode(torch.zeros(1, 3, 5, 16, 16)), "encode", shape=(1, 16, 2, 2, 2))
        checked("vae", vae, vae.decode(z), "decode", shape=(1, 3, 5, 16, 16))
        checked("image", image, image.encode(torch.zeros(1, 3, 9, 9)), batch=1, dim=8)
    checked("solver", UniPC(), UniPC().step(x, velocity, 0.9, 0.5), shape=x.shape)


# Wrappers: a component inside a few lines of a reader's own.


class Plain:
    """A bare pass-through, as a plain object."""

    def __init__(self, inner):
        self.wraps = inner

    def __call__(self, *inputs, **options):
        return self.wraps(*inputs, **options)

    def encode(self, *inputs):
        return self.wraps.encode(*inputs)

    def decode(self, *inputs):
        return self.wraps.decode(*inputs)

    def step(self, *inputs, **options):
        return self.wraps.step(*inputs, **options)


class Module(torch.nn.Module):
    """The same as a module."""

    def __init__(self, inner):
        super().__init__()
        self.wraps = inner

    forward, encode, decode, step = Plain.__call__, Plain.encode, Plain.decode, Plain.step


class Unsaid(torch.nn.Module):
    """One that does not say what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inside = inner

    def forward(self, *inputs, **options):
        return self.inside(*inputs, **options)

    def encode(self, *inputs):
        return self.inside.encode(*inputs)

    def decode(self, *inputs):
        return self.inside.decode(*inputs)


PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
TAPS = {
    "text": "layers.1.attn.probs",
    "image": "layers.0.attn.probs",
    "dit": "blocks.1.cross_attn.probs",
    "vae": "decoder.pixels",
    "experts": "high.blocks.1.cross_attn.probs",
}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    two = Experts(small.dit("i2v", seed=0), small.dit("i2v", seed=5), boundary=0.5)
    return {"one": small.pipeline(folder, "i2v"), "two": small.pipeline(folder, "i2v", dit=two)}


@pytest.mark.parametrize("wrapper", [Plain, Module, Unsaid, lambda inner: Plain(Module(inner))])
@pytest.mark.parametrize("part", ["text", "image", "dit", "vae", "experts"])
def test_a_component_in_a_bare_wrapper_is_the_component(pipes, part, wrapper):
    role = "dit" if part == "experts" else part
    pipe = pipes["two" if part == "experts" else "one"]
    scale = (3.0, 4.0) if part == "experts" else 4.0
    around = pipe.replace(**{role: wrapper(pipe.components[role])})
    assert (around.task, around.patch, around.stride, around.channels) == (
        "i2v",
        (1, 2, 2),
        (4, 8, 8),
        small.Z,
    )

    def run(pipe):
        return pipe("a red circle moving left", image=PHOTO, scale=scale)

    plain = run(pipe)
    assert run(around) == plain and run(around.replace(text=pipe.text, vae=pipe.vae)) == plain
    assert run(around.replace(**{role: pipe.components[role]})) == plain

    name = TAPS[part]
    with capture(pipe, f"{role}.{name}") as bare:
        run(pipe)
    for looked_at, tap in ((around, f"{role}.{name}"), (around.components[role], name)):
        with capture(looked_at, tap) as seen:
            assert run(around) == plain
        assert {str(where) for where, _ in seen} == {tap}
        for (_, value), (_, same) in zip(seen, bare, strict=True):
            assert torch.equal(value, same)
    with patch(around, f"{role}.{name}", lambda x, where: x * 0):
        assert run(around) != plain


@pytest.mark.parametrize("wrapper", [Plain, Module, Unsaid])
@pytest.mark.parametrize(
    "task, given",
    [
        ("t2v", {}),
        ("ti2v", dict(image=PHOTO)),
        ("flf2v", dict(image=PHOTO, last_image=PHOTO[::-1])),
        ("vace", dict(references=[PHOTO], mask=torch.ones(small.FRAMES, *small.SIZE), control_scale=0.5)),
    ],
)
def test_a_dit_of_any_task_in_a_bare_wrapper_is_the_dit(tmp_path, task, given, wrapper):
    pipe = small.pipeline(tmp_path, task)
    around = pipe.replace(dit=wrapper(pipe.dit))
    assert around.task == task and around("a star", **given) == pipe("a star", **given)


@pytest.mark.parametrize("wrapper", [Plain, Module])
@pytest.mark.parametrize(
    "solver", [UniPC(order=3), DPMSolverPP(order=3), Euler()], ids=lambda s: type(s).__name__
)
def test_a_solver_in_a_bare_wrapper_is_the_solver(pipes, solver, wrapper):
    run = dict(prompt="a star", image=PHOTO, steps=5)
    assert pipes["one"](**run, solver=wrapper(solver)) == pipes["one"](**run, solver=solver)


@pytest.mark.parametrize("wrapper", [Plain, Module])
def test_a_guide_in_a_bare_wrapper_is_the_guide(pipes, wrapper):
    run = dict(prompt="a star", image=PHOTO)
    assert pipes["one"](**run, scale=wrapper(CFG(3.0))) == pipes["one"](**run, scale=3.0)


def test_a_wrapper_that_changes_what_goes_in_works_with_and_without_prepare(pipes):
    class Loud(Plain):
        """The text twice as loud: it needs the list of features, and so says that it prepares nothing."""

        prepare = None

        def __call__(self, x, t, text, **rest):
            return self.wraps(x, t, [2 * features for features in text], **rest)

    class Darker:
        """Another picture on its way in; keys and values of the text pass through."""

        def __init__(self, dit):
            self.dit, self.prepare = dit, dit.prepare

        def __call__(self, x, t, text, y=None, **rest):
            return self.dit(x, t, text, y=y - 1, **rest)

    pipe = pipes["one"]
    plain = pipe("a star", image=PHOTO)
    for wrapper in (Loud, Darker):
        changed = pipe.replace(dit=wrapper(pipe.dit))
        assert changed.task == "i2v" and changed("a star", image=PHOTO) != plain


def test_a_wrapper_s_own_word_comes_first_and_a_bare_function_has_the_defaults():
    class Wide(Plain):
        text_dim, prepare = 99, None

    dit = small.dit("i2v")
    assert fact("dit", Plain(dit), "text_dim") == small.TEXT["dim"] == fact("dit", Unsaid(dit), "text_dim")
    assert fact("dit", Plain(dit), "prepare") == dit.prepare and fact("dit", Unsaid(dit), "prepare") is None
    assert fact("dit", Wide(dit), "text_dim") == 99 and fact("dit", Wide(dit), "prepare") is None
    assert fact("dit", print, "patch") == (1, 2, 2) and fact("dit", print, "image_dim") is None
    assert fact("vae", Plain(None), "stride") == (4, 8, 8) and device_of(Plain(dit)).type == "cpu"


# Names that make components.


def test_a_name_makes_a_component_or_says_what_to_pass():
    register("text", "words", Words)
    register("dit", "zero", lambda x, t, text: x * 0)
    register("vae", "made", lambda: Plain(Plain(None)))

    @register("text", "table")
    class Table(Words):
        def __init__(self, rows, width=8):
            pass

    assert isinstance(component_for("text", "words"), Words)
    assert isinstance(component_for("vae", "made"), Plain)
    assert component_for("dit", "zero")(torch.ones(2), 0, []).sum() == 0
    with pytest.raises(
        ValueError, match=r"'table' is made from rows, which a name does not say; .* text=Table\(...\)"
    ):
        component_for("text", "table")
    with pytest.raises(
        ValueError, match=r"no text component 'umt5'; there are: table, words. Pass the component"
    ):
        component_for("text", "umt5")


def test_a_pipeline_takes_its_parts_guides_and_rewriters_by_name(pipes):
    pipe, run = pipes["one"], dict(image=PHOTO, steps=1)
    register("text", "same", lambda: pipe.text)
    register("guide", "weak", lambda: CFG(1.5))
    register("rewrite", "starry", lambda prompt: prompt + " and a star")
    assert pipe.replace(text="same").text is pipe.text
    assert pipe("a", **run, scale="weak") == pipe("a", **run, scale=1.5)
    assert pipe("a", **run, scale="cfg").settings["scale"] == "cfg"
    with pytest.warns(UserWarning, match="the prompt was rewritten from 'a circle'"):
        rewritten = pipe("a circle", **run, rewrite="starry")
    assert rewritten == pipe("a circle and a star", **run)
    assert rewritten.settings["prompt"] == "a circle and a star"
    with pytest.raises(ContractError, match="expected a prompt that is not empty"):
        pipe("a circle", **run, rewrite=lambda prompt: "")


def test_notes_are_about_the_prompt_that_the_model_reads(pipes):
    run = pipes["one"].prepare("a star", image=PHOTO, rewrite=lambda prompt: "red circle " * 1000)
    rewritten, cut = run.notes
    assert rewritten.startswith("the prompt was rewritten from 'a star' to 'red circle red")
    assert "tokens, of which the model reads the first 31" in cut
    run = pipes["one"].prepare("red circle " * 1000, image=PHOTO, rewrite=lambda prompt: "a star")
    assert len(run.notes) == 1
