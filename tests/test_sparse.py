"""Does a sparse pattern keep the pairs of its definition and no others, whatever kernel computes them?"""

import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import small
import sparse_curve
import torch
from torch.nn.attention.flex_attention import create_block_mask

from moddiff import capture, patch
from moddiff.extensions import apply, causal, compiled, sparse, windowed
from moddiff.extensions.sparse import radial, sliding
from moddiff.hooks import at, identity
from moddiff.tiny import world

GUIDES = Path(__file__).parents[1] / "guides"
FACTS = json.loads((GUIDES / "figures" / "sparse.json").read_text(encoding="utf-8"))
GRIDS = [(1, 1, 1), (2, 3, 5), (5, 2, 3), (9, 3, 3), (4, 1, 7)]
flex_on_a_cpu = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


# ---- the patterns ----------------------------------------------------------------------------------------


def by_definition(grid, may):
    """The mask, pair by pair of (frame, row, column), with Python's numbers."""
    cells = list(itertools.product(*map(range, grid)))
    return torch.tensor([[bool(may(mine, other)) for other in cells] for mine in cells])


def pattern_of(function, grid, **how):
    tokens = torch.arange(grid[0] * grid[1] * grid[2])
    return function(tokens[:, None], tokens, grid, **how)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("time", "space"), [(0, 0), (1, 1), (2, None), (None, 1), (1, 2), (None, None)])
def test_the_sliding_window_is_what_lies_near_in_time_and_space(grid, time, space):
    def may(mine, other):
        frames, rows, columns = (abs(a - b) for a, b in zip(mine, other))
        return (time is None or frames <= time) and (space is None or max(rows, columns) <= space)

    kept = pattern_of(sliding, grid, time=time, space=space)
    assert torch.equal(kept, by_definition(grid, may))


@pytest.mark.parametrize("grid", [*GRIDS, (11, 3, 7), (17, 1, 2)])
@pytest.mark.parametrize(("decay", "block"), [(1.0, 128), (1.0, 4), (0.5, 4), (0.2, 1), (0.7, 3)])
def test_the_radial_pattern_is_that_of_the_paper(grid, decay, block):
    tokens = grid[1] * grid[2]

    def may(mine, other):
        distance = abs(mine[0] - other[0])
        apart = abs((mine[1] - other[1]) * grid[2] + mine[2] - other[2])
        if other[0] == 0 or distance == 0:
            return True
        if distance == 1:
            return apart <= tokens // 2
        reach = 2 ** len(f"{tokens:b}") / 2 ** len(f"{distance:b}")
        if reach < block and distance % int(block / reach):
            return False
        return apart <= max(decay * reach, block)

    assert torch.equal(pattern_of(radial, grid, decay=decay, block=block), by_definition(grid, may))


def test_at_wans_size_radial_spends_half_as_much_on_twice_the_distance():
    grid = 21, 30, 52
    frame = torch.arange(30 * 52)
    kept = {  # of the pairs of two frames, 1 and 1 + distance
        distance: float(radial(frame[:, None] + 1560, frame + 1560 * (1 + distance), grid).double().mean())
        for distance in (2, 4, 8, 16, 17)
    }
    assert 0.5 < kept[2] < 0.6  # 512 places to each side, of 1560
    assert 0.5 < kept[4] / kept[2] < 0.6 and 0.5 < kept[8] / kept[4] < 0.6
    assert kept[16] == kept[8] and kept[17] == 0  # 64 were less than a block: one frame in two


# ---- the component ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit():
    return small.dit().requires_grad_(False)


def inputs(frames=3, height=4, width=6, seed=0):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(1, small.Z, frames, height, width, generator=made)
    return x, torch.tensor([500.0]), [torch.randn(5, small.TEXT["dim"], generator=made)]


def by_hand(dit, mask, *given_, blocks=(0, 1)):
    """The oracle: the pairs are taken out of the scores of the plain model."""

    def hide(scores, where):
        return scores.masked_fill(~mask, float("-inf"))

    names = [f"blocks.{i}.self_attn.scores" for i in blocks]
    with patch(dit, names[0], hide), patch(dit, names[-1], hide if len(names) > 1 else identity):
        return dit(*given_)


@flex_on_a_cpu
@pytest.mark.parametrize("kernel", ["sdpa", "math", "flex", "sdpa-flash", "sdpa-math"])
@pytest.mark.parametrize("size", [(3, 4, 6), (5, 2, 10), (2, 14, 12)])
def test_every_kernel_computes_the_pairs_of_the_pattern(dit, kernel, size):
    given_ = inputs(*size)
    grid = size[0], size[1] // 2, size[2] // 2
    wanted = by_hand(dit, pattern_of(sliding, grid, time=1, space=1), *given_)
    narrow = sparse(dit, "sliding", time=1, space=1)
    narrow.use_kernel(kernel)
    torch.testing.assert_close(narrow(*given_), wanted, atol=1e-5, rtol=0)
    assert (wanted - dit(*given_)).abs().max() > 1e-3 or grid == (2, 7, 6)


@flex_on_a_cpu
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_who_looks_sees_masked_scores_and_changes_nothing(dit, kernel):
    narrow, given_ = sparse(dit, "radial", block=2, decay=0.5).use_kernel(kernel), inputs()
    plain = narrow(*given_)
    with capture(narrow, "blocks.1.self_attn.scores", "blocks.1.self_attn.probs") as seen:
        assert torch.equal(narrow(*given_), plain)
    kept = pattern_of(radial, (3, 2, 3), block=2, decay=0.5)
    assert torch.equal(seen["scores"].isfinite().all(1)[0], kept) and not kept.all()
    assert torch.equal(seen["probs"] > 0, kept.expand_as(seen["probs"]))
    with capture(narrow, "blocks.1.self_attn.probs", rows=[4]) as row:
        narrow(*given_)
    torch.testing.assert_close(row["probs"], seen["probs"][:, :, [4]], atol=1e-6, rtol=0)
    with patch(narrow, "blocks.1.self_attn.probs", identity):  # written out, with the same mask
        torch.testing.assert_close(narrow(*given_), plain, atol=1e-5, rtol=0)


def test_dense_blocks_and_dense_steps_listen_to_everything(dit):
    given_, mask = inputs(), pattern_of(sliding, (3, 2, 3), time=0, space=0)
    own = dict(pattern="sliding", time=0, space=0)
    narrow = sparse(dit, **own, dense_blocks=1)
    torch.testing.assert_close(narrow(*given_), by_hand(dit, mask, *given_, blocks=[1]), atol=1e-5, rtol=0)
    late = sparse(dit, **own, dense_steps=2)
    for step in (0, 1):
        with at(step=step):
            assert torch.equal(late(*given_), dit(*given_))
    with at(step=2):
        assert torch.equal(late(*given_), sparse(dit, **own)(*given_))
    assert torch.equal(late(*given_), sparse(dit, **own)(*given_)), "a call by hand says no step"


def test_each_size_of_film_has_its_own_mask(dit):
    narrow = sparse(dit, "sliding", time=1, space=0)
    sizes = [(3, 4, 6), (4, 4, 6), (3, 6, 4)]
    alone = [sparse(dit, "sliding", time=1, space=0)(*inputs(*size)) for size in sizes]
    for _ in range(2):
        for size, wanted in zip(sizes, alone):
            assert torch.equal(narrow(*inputs(*size)), wanted)


def test_a_window_is_narrowed_by_its_own_size(tmp_path):
    pipe = small.pipeline(tmp_path)
    own = dict(pattern="sliding", time=0, space=None)
    outer = pipe.replace(dit=sparse(windowed(pipe.dit, length=2, overlap=1, riflex=1), **own))
    inner = pipe.replace(dit=windowed(sparse(pipe.dit, **own), length=2, overlap=1, riflex=1))
    ends = [[state.next for state in each.steps("a red circle", seed=0)][-1] for each in (outer, inner)]
    assert torch.equal(*ends)


def test_the_report_says_what_was_kept(tmp_path):
    pipe = small.pipeline(tmp_path)
    new = pipe.replace(dit=sparse(pipe.dit, "sliding", time=0, space=None, dense_blocks=1, dense_steps=1))
    new("a red circle", seed=0)
    rows = new.dit.report().rows
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2] and rows[0]["branch"] == "cond"
    assert [round(row["kept"], 6) for row in rows[::2]] == [1, *[round((1 + 1 / 3) / 2, 6)] * 2]
    assert repr(new.dit) == "sparse(DiT, 'sliding', time=0, space=None, dense_blocks=1, dense_steps=1)"


def test_a_pattern_of_ones_own(dit):
    def later(query, key, grid, frames=1):
        return key // (grid[1] * grid[2]) >= query // (grid[1] * grid[2]) - frames

    given_ = inputs()
    tokens = torch.arange(18)
    mask = tokens // 6 >= tokens[:, None] // 6 - 1
    wanted = by_hand(dit, mask, *given_)
    torch.testing.assert_close(sparse(dit, later, frames=1)(*given_), wanted, atol=1e-5, rtol=0)
    for kernel in ("sdpa", "flex"):
        blind = sparse(dit, lambda query, key, grid: query + key < 6).use_kernel(kernel)
        with pytest.raises(ValueError, match=r"lets token 6 of a film of \(3, 2, 3\) tokens look nowhere"):
            blind(*given_)


def test_a_profile_names_it(dit):
    new = apply(dit, [["sparse", "radial", {"decay": 0.5, "block": 2}]])
    assert torch.equal(new(*inputs()), sparse(dit, "radial", decay=0.5, block=2)(*inputs()))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(pattern="spiral"), "there are sliding, radial, or pass a function"),
        (dict(pattern=3), "or pass a function"),
        (dict(pattern="radial", time=1), "'time'; the pattern takes decay, block"),
        (dict(pattern=lambda query, key, grid, most: query < most), "'most'; the pattern takes most"),
        (dict(pattern=lambda query, key, grid: True), "says True where one token looks at itself"),
        (dict(pattern="sliding", time=-1), r"says tensor\(\[False\]\) where one token looks at itself"),
        (dict(pattern="radial", dense_blocks=-1), "dense_blocks=-1.*from 0 on"),
        (dict(pattern="radial", dense_steps=0.5), "dense_steps=0.5.*a whole number"),
    ],
)
def test_what_there_is_none_of_is_refused(dit, how, said):
    with pytest.raises(ValueError, match=said):
        sparse(dit, **how)


def test_attention_that_is_not_its_own_to_change_is_refused(dit):
    with pytest.raises(ValueError, match="has its own"):
        sparse(causal(dit), "radial")
    with pytest.raises(ValueError, match="which is compiled"):
        sparse(compiled(dit, backend="eager"), "radial")
    with pytest.raises(ValueError, match="attention of a dit of ours; Tiny arrived"):
        sparse(Tiny(), "radial")


class Tiny:
    def __call__(self, x, t, text, image=None, y=None):
        return x


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says that it has a Hopper card and the flash-attn package."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))


@pytest.mark.parametrize("make", [lambda dit: sparse(dit, "radial"), causal], ids=["sparse", "causal"])
def test_a_kernel_without_masks_is_refused_before_and_after(make, gpu):
    half = small.dit().bfloat16()
    with pytest.raises(ValueError, match="cannot take a bias or mask, which blocks.0.self_attn has"):
        make(half).use_kernel("flash")
    with pytest.raises(ValueError, match="cannot take a bias or mask"):
        make(half.use_kernel("flash"))


# ---- the figures -----------------------------------------------------------------------------------------


def test_the_guide_has_the_tables_of_the_file():
    guide = (GUIDES / "kernels.md").read_text(encoding="utf-8")
    for table in sparse_curve.tables(FACTS):
        assert table in guide
    assert f"-n {FACTS['prompts']} -o guides/figures/sparse.json" in guide
    assert FACTS["prompts"] >= 16 and [row["pattern"] for row in FACTS["rows"]][1:] == list(
        sparse_curve.TRIED
    )


@pytest.mark.parametrize("name", sparse_curve.TRIED)
def test_the_pairs_on_file_are_those_of_the_pattern(name):
    """Of the tiny model's own film: five frames of 6 x 6 tokens, eight blocks, twenty steps."""
    pattern, how = sparse_curve.TRIED[name]
    blocks, steps = how.get("dense_blocks", 0) / 8, how.get("dense_steps", 0) / 20
    own = {key: value for key, value in how.items() if not key.startswith("dense_")}
    function = pattern if callable(pattern) else {"sliding": sliding, "radial": radial}[pattern]
    density = float(pattern_of(function, (5, 6, 6), **own).double().mean())
    kept = steps + (1 - steps) * (blocks + (1 - blocks) * density)
    row = next(row for row in FACTS["rows"] if row["pattern"] == name)
    assert row["kept"] == pytest.approx(kept, abs=1e-5)


@pytest.mark.parametrize("grid", [(3, 9, 11), (5, 7, 8)])
@pytest.mark.parametrize(
    ("function", "how"), [(sliding, dict(time=0, space=1)), (radial, dict(decay=0.2, block=4))]
)
def test_a_tile_counts_when_it_has_a_pair_as_flex_counts(grid, function, how):
    n = grid[0] * grid[1] * grid[2]

    def may(batch, head, query, key):
        return function(query, key, grid, **how)

    tiles = create_block_mask(may, None, None, n, n, device="cpu").to_dense()
    found = sparse_curve.full_size(function, grid, **how)
    assert found["tiles"] == pytest.approx(float(tiles.double().mean()))
    assert found["pairs"] == pytest.approx(float(pattern_of(function, grid, **how).double().mean()))


def test_the_command_keeps_its_films_and_goes_on(tmp_path, monkeypatch, capsys):
    pipe, made, film = small.pipeline(tmp_path), [], sparse_curve.film

    def counted(*given_):
        made.append(given_[1])
        return film(*given_)

    monkeypatch.setattr("moddiff.load", lambda model: pipe, raising=False)
    monkeypatch.setattr(sparse_curve, "film", counted)
    monkeypatch.setattr(sparse_curve, "WAN", (3, 2, 3))
    monkeypatch.setattr(sparse_curve, "TRIED", {"near": ("sliding", dict(time=0, space=None))})
    out = tmp_path / "sparse.json"
    sparse_curve.main(["-n", "1", "-o", str(out)])
    sparse_curve.main(["-n", "2", "-o", str(out)])
    assert [text for text, _ in world.prompts(2, split="heldout") for _ in range(2)] == made
    facts = json.loads(out.read_text())
    assert facts["prompts"] == 2 and facts["rows"][1]["kept"] == pytest.approx(1 / 3)
    assert "| near | 33 |" in capsys.readouterr().out


def test_the_picture_shows_each_pattern_with_its_share(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sparse_curve.viz, "dress", lambda ax, title, *words: shown.append(title))
    sparse_curve.main(["--picture", str(tmp_path / "sparse.png")])
    assert (tmp_path / "sparse.png").read_bytes().startswith(b"\x89PNG")
    assert shown == ["sliding: 1 frame: 31 %", "sliding: 1 row and column: 39 %", "radial, decay 1: 73 %"]
