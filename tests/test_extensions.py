"""Does every extension keep the promises (extensions/promises.py)?  One row each, the same tests for all."""

import gc
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint

import pytest
import small
import torch
from torch import nn

import moddiff
from moddiff import capture, hooks, patch, roles, taps
from moddiff.experts import Experts
from moddiff.extensions import (
    Extension,
    Memory,
    adapted,
    apply,
    bare,
    cached,
    causal,
    compiled,
    expect,
    extension,
    layers,
    offloaded,
    parallel,
    quantized,
    sparse,
    stack,
    tiled,
    twin,
    windowed,
)
from moddiff.hooks import OneRun, at
from moddiff.roles import ContractError

PROMPT = "a red circle moving left on a black background"


# Two extensions as anybody may write them: one changes layers, one remembers.


@extension
def halved(part, skip=()):
    """Half the output of every linear layer of the feed-forward."""
    expect("dit", part, "halved")
    rows = []
    for path, layer in layers(part).items():
        if ".ffn.2" in path and path not in skip:
            layer.weight = nn.Parameter(layer.weight.detach() / 2, requires_grad=False)
            rows.append({"layer": path, "factor": 0.5})
    return Extension(part, exact=False, rows=rows)


class Skipping(Extension):
    """Every second step returns what the step before it returned."""

    def forward(self, *inputs, **options):
        here, step = self.memory.here(), hooks.position().get("step")
        skips = here.get("last") is not None and step % 2 == 1
        if not skips:
            here["last"] = self.wraps(*inputs, **options)
        self.memory.note(step=step, branch=hooks.position().get("branch"), skipped=skips)
        return here["last"]


@extension
def skipping(dit):
    expect("dit", dit, "skipping")
    return Skipping(dit, exact=False)


@extension
def untouched(part):
    return Extension(part, exact=True)


# The table: one row for each extension of the package, and for the two above.


@dataclass(frozen=True)
class Case:
    """What the tests need to know of one extension.

    make    component -> the extended one
    said    its repr, made of a bare component named X
    role    the role that it takes
    within  how far it may be from the bare component, as a share of the largest value; 0 where it is exact
    rounds  exact, but for the order in which numbers are added: `within` says how far
    notes   does a run add rows to its report?
    other   does it take components of other roles, too?
    """

    make: object
    said: str
    role: str = "dit"
    within: float = 0.0
    rounds: bool = False
    notes: bool = False
    other: bool = False


CASES = {
    "halved": Case(
        partial(halved, skip=("blocks.0.ffn.2",)), "halved(X, skip=('blocks.0.ffn.2',))", within=9.0
    ),
    "skipping": Case(skipping, "skipping(X)", within=9.0, notes=True),
    "untouched": Case(untouched, "untouched(X)", other=True),
    "offloaded": Case(partial(offloaded, keep=0), "offloaded(X, keep=0)", notes=True, other=True),
    "offloaded to disk": Case(
        partial(offloaded, source="disk"), "offloaded(X, source='disk')", notes=True, other=True
    ),
    **{
        f"quantized {kind}": Case(
            partial(quantized, kind=kind), f"quantized(X, kind={kind!r})", within=0.5, other=True
        )
        for kind in ("int8", "int8-dynamic", "fp8", "fp8-dynamic", "q8_0", "q4_0")
    },
    "tiled": Case(
        partial(tiled, size=(16, 32), overlap=(8, 16)),
        "tiled(X, size=(16, 32), overlap=(8, 16))",
        role="vae",
        within=2.0,
        notes=True,
    ),
    "offloaded vae": Case(offloaded, "offloaded(X)", role="vae", other=True),
    "cached": Case(
        partial(cached, policy="first-block", threshold=0.5),
        "cached(X, policy='first-block', threshold=0.5)",
        within=2.0,
        notes=True,
    ),
    "cached whole": Case(
        partial(cached, policy="easycache", threshold=9.0, first=1),
        "cached(X, policy='easycache', threshold=9.0, first=1)",
        within=2.0,
        notes=True,
    ),
    "adapted": Case(partial(adapted, rank=3), "adapted(X, rank=3)"),
    "compiled": Case(
        partial(compiled, backend="eager"),
        "compiled(X, backend='eager')",
        within=1e-5,
        rounds=True,
        notes=True,
    ),
    "parallel": Case(parallel, "parallel(X)", notes=True, other=True),
    "sparse": Case(
        partial(sparse, pattern="sliding", time=1, space=0),
        "sparse(X, pattern='sliding', time=1, space=0)",
        within=9.0,
        notes=True,
    ),
    "causal": Case(partial(causal, chunk=1), "causal(X, chunk=1)", within=9.0),
    "windowed": Case(
        partial(windowed, length=2, overlap=1), "windowed(X, length=2, overlap=1)", within=9.0, notes=True
    ),
}
by_name = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def extended(pipe, name):
    """The pipeline with that extension, and the component it replaced."""
    case = CASES[name]
    part = getattr(pipe, case.role)
    return pipe.replace(**{case.role: case.make(part)}), part


def latents(pipe, **options):
    return [state.next for state in pipe.steps(PROMPT, **({"seed": 3} | options))]


def result(pipe, role, **options):
    """What shows whether a component computes the same: the latents, or for a vae the pixels."""
    if role != "vae":
        return torch.stack(latents(pipe, **options))
    video = torch.rand(1, 3, small.FRAMES, *small.SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return pipe.vae.decode(pipe.vae.encode(video))


def test_every_extension_of_the_package_has_its_row():
    assert set(roles.BUILT_IN["extension"]) <= {name.split()[0] for name in CASES}


@by_name
def test_what_came_in_is_unchanged(pipe, name):
    part = getattr(pipe, CASES[name].role)
    before = {
        key: (id(x), x.clone(), x.requires_grad, x.dtype)
        for key, x in part.state_dict(keep_vars=True).items()
    }
    plain, modules = result(pipe, CASES[name].role), dict(part.named_modules())
    new, _ = extended(pipe, name)
    result(new, CASES[name].role)
    changed = getattr(new, CASES[name].role)
    changed.to(torch.float64).requires_grad_(True)
    after = part.state_dict(keep_vars=True)
    for key, x in after.items():
        assert (id(x), x.requires_grad, x.dtype) == (before[key][0], *before[key][2:]), key
    assert all(torch.equal(x, before[key][1]) for key, x in after.items())
    assert {path: id(m) for path, m in part.named_modules()} == {path: id(m) for path, m in modules.items()}
    assert torch.equal(result(pipe, CASES[name].role), plain)


@by_name
def test_it_says_which_tensors_it_shares(pipe, name):
    new, part = extended(pipe, name)
    new = getattr(new, CASES[name].role)
    held = {x.data_ptr() for x in part.state_dict().values()}
    shared = any(x.data_ptr() in held for x in new.state_dict().values())
    assert new.shares == shared
    assert ("its tensors are also those of" in repr(new.report())) == shared


@by_name
def test_it_plays_the_same_role(pipe, name):
    new, part = extended(pipe, name)
    role = CASES[name].role
    changed = getattr(new, role)
    for fact in getattr(roles.ROLES[role], "__annotations__", {}):
        value = roles.fact(role, changed, fact)
        if fact in ("window", "chunk"):  # how many frames at a time: what an extension may change
            continue
        assert callable(value) or value == roles.fact(role, part, fact), fact
    assert len(new(PROMPT, seed=0, steps=2).frames) == small.FRAMES
    assert changed.config is part.config or changed.config == part.config


@by_name
def test_taps_keep_their_names(pipe, name):
    new, part = extended(pipe, name)
    assert set(taps(part).names) <= set(taps(getattr(new, CASES[name].role)).names)
    if CASES[name].role == "dit":
        with capture(new.dit, "blocks.1.cross_attn.probs", steps=0) as seen:
            new(PROMPT, seed=0, steps=2)
        assert len(seen)
        with patch(new.dit, "blocks.1.cross_attn.out", hooks.zero()):
            other = latents(new)
        assert not torch.equal(torch.stack(other), torch.stack(latents(new)))


@by_name
def test_exact_means_equal(pipe, name):
    new, _ = extended(pipe, name)
    case = CASES[name]
    plain, other = result(pipe, case.role), result(new, case.role)
    exact = getattr(new, case.role).exact
    assert exact == (case.within == 0 or case.rounds)
    if exact and not case.rounds:
        assert torch.equal(other, plain)
    else:
        assert (other - plain).abs().max() <= case.within * plain.abs().max()


@by_name
def test_two_runs_in_turn_do_not_mix(pipe, name):
    new, _ = extended(pipe, name)
    if CASES[name].role == "dit":
        alone = latents(new, seed=1), latents(new, seed=2)
        turns = zip(new.steps(PROMPT, seed=1), new.steps(PROMPT, seed=2))
        for i, (first, second) in enumerate(turns):
            assert torch.equal(first.next, alone[0][i]) and torch.equal(second.next, alone[1][i])


@by_name
def test_it_reports(pipe, name):
    new, _ = extended(pipe, name)
    changed, case = getattr(new, CASES[name].role), CASES[name]
    made = len(changed.report().rows)
    result(new, case.role)
    rows = changed.report().rows
    assert isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    assert (len(rows) > made) == case.notes
    result(new, case.role)
    assert len(changed.report().rows) == len(rows), "the rows of an earlier run are still there"
    assert "<table>" in changed.report()._repr_html_() and repr(changed) in repr(changed.report())


@by_name
def test_its_repr_reads_as_the_call_that_made_it(pipe, name):
    new, part = extended(pipe, name)
    changed = getattr(new, CASES[name].role)
    assert repr(changed) == CASES[name].said.replace("X", type(part).__name__)
    assert repr(changed) in repr(new)
    assert repr(untouched(changed)) == f"untouched({changed!r})"


@by_name
def test_a_copy_and_its_weights_are_as_usual(pipe, name):
    new, part = extended(pipe, name)
    changed, role = getattr(new, CASES[name].role), CASES[name].role
    copied = deepcopy(changed)
    assert repr(copied) == repr(changed) and copied.wraps is not changed.wraps
    assert torch.equal(result(new.replace(**{role: copied}), role), result(new, role))
    assert {name.split(".")[0] for name in changed.state_dict()} == {
        name.split(".")[0] for name in part.state_dict()
    }
    copied.load_state_dict(changed.state_dict())
    assert torch.equal(result(new.replace(**{role: copied}), role), result(new, role))
    if role == "dit":
        assert changed.use_kernel("math") is changed and part.blocks[0].self_attn.kernel == "sdpa"


@by_name
def test_a_slip_is_told_at_the_call(pipe, name):
    case = CASES[name]
    function = case.said.partition("(")[0]
    with pytest.raises(
        ContractError, match=rf"{function} takes one component, and a Pipeline arrived: .*replace"
    ):
        case.make(pipe)
    with pytest.raises(ContractError, match=f"{function} takes a component, and the class DiT arrived"):
        case.make(type(pipe.dit))
    with pytest.raises(ContractError, match=f"{function} takes a"):
        case.make("dit.safetensors")
    if not case.other:
        other = pipe.dit if case.role != "dit" else pipe.vae
        with pytest.raises(ContractError, match=f"{function} takes .*{type(other).__name__} arrived"):
            case.make(other)


# The tools.


def test_a_twin_has_the_same_memory_and_lives_its_own_life(pipe):
    for part in (pipe.dit, pipe.text, pipe.vae, Experts(pipe.dit, small.dit(seed=4), 0.9)):
        other, held = twin(part), {x.data_ptr() for x in part.state_dict().values()}
        assert {x.data_ptr() for x in other.state_dict().values()} == held
        other.to(torch.float64)
        assert {x.data_ptr() for x in part.state_dict().values()} == held
        assert {x.dtype for x in part.parameters()} == {torch.float32}


def test_a_twin_of_tied_weights_is_tied():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert twin(tied)[1].weight is twin(tied)[0].weight or len(list(twin(tied).parameters())) == 3


def test_what_has_no_modules_is_wrapped_as_it_is():
    def constant(x, t, text, image=None, y=None):
        return torch.zeros_like(x)

    new = untouched(constant)
    assert new.wraps is constant and repr(new) == "untouched(function)"
    assert new(torch.ones(1, 2, 1, 2, 2), None, None).sum() == 0


def test_layers_have_the_names_of_taps_through_any_stack(pipe):
    for part in (pipe.dit, pipe.text, pipe.vae, pipe.dit.blocks[0]):
        assert layers(part) == {path: m for path, m in part.named_modules() if isinstance(m, nn.Linear)}
    deep = untouched(halved(skipping(pipe.dit)))
    assert list(layers(deep)) == list(layers(pipe.dit))
    assert [repr(part).partition("(")[0] for part in stack(deep)] == ["untouched", "halved", "skipping"]
    assert type(bare(deep)) is type(pipe.dit) and stack(pipe.dit) == []
    both = untouched(Experts(skipping(pipe.dit), pipe.dit, 0.5))
    assert "high.blocks.1.ffn.2" in layers(both) and set(both.state_dict()) == set(both.wraps.state_dict())
    both.load_state_dict(both.state_dict())


def test_a_misspelt_option_is_the_callers_error(pipe):
    with pytest.raises(TypeError, match="skipp"):
        halved(pipe.dit, skipp=())


def test_memory_belongs_to_a_run():
    memory, mark, other = Memory(), OneRun(), OneRun()
    with at(step=0, run=mark, branch="cond"):
        memory.here()["x"] = 1
    with at(step=0, run=other, branch="cond"):
        assert memory.here() == {}
    with at(step=1, run=mark, branch="cond"):
        assert memory.here() == {"x": 1}
        with at(expert="low"):
            assert memory.here() == {}
        with at(window=(0, 1)):
            assert memory.here() == {}
        with at(branch="uncond"):
            assert memory.here() == {}
    with at(step=0, run=mark, branch="cond"):
        assert memory.here() == {}, "the same run from its first step is a new one"


def test_of_many_windows_those_asked_for_last_are_kept():
    memory, mark = Memory(), OneRun()
    for frame in [*range(70), 6]:
        with at(step=0, run=mark, branch="cond", window=(frame,)):
            memory.here()["frame"] = frame
    found = []
    for frame in (6, *range(69, -1, -1)):
        with at(step=1, run=mark, branch="cond", window=(frame,)):
            found += [frame] if memory.here() and frame not in found else []
    assert sorted(found) == list(range(6, 70)), "6 was asked for once more, so 6 to 69 are the last 64"
    with at(step=1, run=mark, branch="uncond", window=(3,)):
        assert memory.here() == {}


def test_memory_of_a_loop_by_hand_begins_when_the_step_does_not_go_on():
    memory = Memory()
    for _ in range(2):
        with at(step=0):
            assert memory.here() == {}
            memory.here()["x"] = 1
        with at(step=1):
            assert memory.here() == {"x": 1}
    memory.here()["y"] = 1
    assert memory.here() == {}, "without a step nothing is remembered"


def test_what_was_remembered_goes_with_the_run():
    memory, mark = Memory(), OneRun()
    with at(step=0, run=mark):
        memory.here()["x"] = 1
        memory.note(step=0)
    assert len(memory._runs) == 1
    del mark
    gc.collect()
    assert len(memory._runs) == 0 and memory.notes == [{"step": 0}]
    assert deepcopy(memory).notes == []


# Names.


@pytest.fixture
def registry_as_it_was(monkeypatch):
    monkeypatch.setattr(
        roles, "_registered", {role: dict(found) for role, found in roles._registered.items()}
    )


def test_an_extension_is_called_by_its_name(pipe, registry_as_it_was):
    moddiff.register("extension", "halved", halved)
    moddiff.register("extension", "skipping", skipping)
    new = apply(
        pipe.dit, [["skipping"], ["halved", ["blocks.0.ffn.2"]], ["halved", {"skip": ["blocks.1.ffn.2"]}]]
    )
    assert repr(new) == ("halved(halved(skipping(DiT), ['blocks.0.ffn.2']), skip=['blocks.1.ffn.2'])")
    assert apply(pipe.dit, []) is pipe.dit
    with pytest.raises(ValueError, match="there is no extension 'halfed'; did you mean 'halved'"):
        apply(pipe.dit, [["skipping"], ["halfed"]])
    with pytest.raises(ValueError, match="'halved' is no call of an extension"):
        apply(pipe.dit, ["halved"])
    with pytest.raises(ValueError, match="there already is an extension 'halved'"):
        moddiff.register("extension", "halved", skipping)


def test_an_installed_package_adds_an_extension(pipe, monkeypatch):
    entry = EntryPoint("sorted", "builtins:sorted", "moddiff.extensions")
    monkeypatch.setattr(roles, "entry_points", lambda group: [entry] if group == "moddiff.extensions" else [])
    assert roles.get("extension", "sorted") is sorted and "sorted" in roles.names("extension")
