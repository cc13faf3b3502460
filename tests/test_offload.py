"""Do streamed blocks come, compute the same, and go?"""

import re
from copy import deepcopy

import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moddiff.contracts import device_of
from moddiff.experts import Experts
from moddiff.extensions import offload, offloaded
from moddiff.hooks import capture, patch, zero
from moddiff.storage import pages

PROMPT = "a red circle moving left on a black background"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizer"))


def out(dit, seed=0):
    """What a small DiT answers."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(1, small.Z, 3, 4, 6, generator=made)
    text = [torch.randn(5, small.TEXT["dim"], generator=made)]
    with torch.no_grad():
        return dit(x, torch.tensor([500.0]), text)


@pytest.mark.parametrize("source", offload.SOURCES)
@pytest.mark.parametrize("keep", [0, 1, 2, 5])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_it_computes_the_same_and_moves_what_does_not_stay(source, keep, ahead):
    dit = small.dit(num_layers=4)
    new = offloaded(dit, keep=keep, ahead=ahead, source=source)
    assert torch.equal(out(new), out(dit))
    stays = [row["it"] for row in new.report().rows if row.get("part", "").startswith("blocks.")]
    assert stays == ["stays"] * min(keep, 4) + ["streams"] * max(0, 4 - keep)
    moved = sum(x.nbytes for block in dit.blocks[keep:] for x in block.parameters())
    assert [row["MB_moved"] for row in new.report().rows if "MB_moved" in row] == [moved / 1e6] * (keep < 4)
    assert not new.here and not new.guests


class Watched(offload.Visit):
    """Counts the blocks that are here."""

    here, most = 0, 0

    def __init__(self, weights, *args):
        super().__init__(weights, *args)
        if len(weights) > 2:  # a block, not the layer that makes keys
            Watched.here += 1
            Watched.most = max(Watched.most, Watched.here)

    def end(self):
        super().end()
        Watched.here -= len(self.weights) > 2


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_no_more_blocks_are_here_than_was_said(monkeypatch, ahead):
    monkeypatch.setattr(offload, "Visit", Watched)
    Watched.here = Watched.most = 0
    new, beside = offloaded(small.dit(num_layers=5), keep=0, ahead=ahead), []
    with patch(new, "blocks.*.resid_post", lambda x, where: beside.append([*new.here]) or x):
        out(new)
    # While a block computes the next ones are on their way: on a CPU, too, where nothing else runs then.
    assert beside == [[*range(i, min(i + 1 + ahead, 5))] for i in range(5)]
    assert Watched.most == 1 + ahead and Watched.here == 0


def test_copies_compute_and_what_waits_is_not_touched(monkeypatch):
    """On a CPU copies look as the originals do, so the originals are spoilt while the blocks compute."""
    dit = small.dit(num_layers=3)
    plain, new = out(dit), offloaded(dit, keep=0)
    begin, end = offload.Visit.begin, offload.Visit.end

    def spoil(visit):
        begin(visit)
        visit.kept = [home.clone() for home in visit.homes]
        for home in visit.homes:
            home.fill_(float("nan"))

    def mend(visit):
        if hasattr(visit, "kept"):
            for home, kept in zip(visit.homes, visit.kept):
                home.copy_(kept)
        end(visit)

    monkeypatch.setattr(offload.Visit, "begin", spoil)
    monkeypatch.setattr(offload.Visit, "end", mend)
    assert torch.equal(out(new), plain)


def test_an_error_in_a_block_leaves_nothing_behind():
    dit = small.dit(num_layers=3)
    new = offloaded(dit, keep=0)
    plain = out(dit)
    block, forward = new.wraps.blocks[1], new.wraps.blocks[1].forward
    for error in (RuntimeError, KeyboardInterrupt):

        def broken(*inputs, error=error):
            raise error

        block.forward = broken
        with pytest.raises(error):
            out(new)
        block.forward = forward
        assert torch.equal(out(new), plain)
        assert not new.here


def test_a_block_in_a_file_stays_in_it(tmp_path):
    dit = small.dit(num_layers=3)
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    plain = out(dit)
    dit.load_state_dict(load_file(tmp_path / "dit.safetensors"), assign=True)
    new = offloaded(dit, keep=0, source="disk")
    for old, x in zip(dit.blocks.parameters(), new.wraps.blocks.parameters()):
        assert pages.in_a_file(x) and old.data_ptr() == x.data_ptr()
    assert torch.equal(out(new), plain)


def test_what_is_in_no_file_goes_to_one_that_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(offload.tempfile, "tempdir", None)
    dit = small.dit(num_layers=3)
    new = offloaded(dit, keep=1, source="disk")
    assert not any(tmp_path.iterdir())
    assert not any(map(pages.in_a_file, new.wraps.blocks[0].parameters()))
    assert all(map(pages.in_a_file, new.wraps.blocks[2].parameters()))
    assert torch.equal(out(new), out(dit))


def test_text_image_vae_and_experts_too(pipe, tmp_path):
    text = offloaded(pipe.text, keep=0, source="disk")
    assert torch.equal(text.encode([PROMPT])[0], pipe.text.encode([PROMPT])[0])
    picture = torch.rand(1, 3, 20, 30)
    image = small.pipeline(tmp_path, task="i2v").image
    assert torch.equal(offloaded(image).encode(picture), image.encode(picture))
    vae, latent = offloaded(pipe.vae, source="disk"), torch.randn(1, small.Z, 2, 3, 2)
    assert torch.equal(torch.cat([*vae.stream(latent)], 2), torch.cat([*pipe.vae.stream(latent)], 2))
    both = Experts(pipe.dit, small.dit(seed=4), 0.9)
    new = pipe.replace(dit=offloaded(both, keep=0))
    assert np_equal(new(PROMPT, seed=0), pipe.replace(dit=both)(PROMPT, seed=0))
    assert {row["part"].split(".")[0] for row in new.dit.report().rows if "part" in row} == {"high", "low"}


def np_equal(one, other):
    return (one.frames == other.frames).all()


def test_where_it_computes_is_told_though_weights_wait_elsewhere(pipe):
    new = offloaded(pipe.dit, keep=0)
    assert device_of(new) == torch.device("cpu")
    new.device = torch.device("meta")  # as a GPU would be: the weights are not there
    assert device_of(new) == device_of(adapted_by_hand(new)) == torch.device("meta")


def adapted_by_hand(dit):
    """A wrapper of a reader's own."""

    class Wrapper:
        wraps = dit

        def __call__(self, *inputs, **options):
            return dit(*inputs, **options)

    return Wrapper()


def test_edits_and_cameras_see_blocks_that_come_and_go(pipe):
    new = pipe.replace(dit=offloaded(pipe.dit, keep=0, ahead=2))
    seen = []
    for one in (pipe, new):
        with patch(one.dit, "blocks.0.ffn", zero()), capture(one.dit, "blocks.1.resid_post") as record:
            one(PROMPT, seed=0, steps=2)
        seen.append([x for _, x in record])
    assert len(seen[0]) == 4 and all(map(torch.equal, *seen))


def test_a_copy_streams_its_own_blocks():
    dit = small.dit(num_layers=3)
    new = offloaded(dit, keep=0)
    copied = deepcopy(new)
    assert {id(m) for m in copied.streamed} == {id(m) for m in copied.wraps.blocks}
    assert torch.equal(out(copied), out(dit)) and not new.report().rows[-1].get("MB_moved")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(keep=-1), "keep=-1); expected a whole number from 0"),
        (dict(ahead=1.5), "ahead=1.5); expected a whole number from 0"),
        (dict(source="cloud"), "source='cloud'); expected 'memory' or 'disk'"),
        (dict(device="cuda"), "torch sees no GPU; leave device out"),
    ],
)
def test_a_slip_is_told(options, message):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        options, message = dict(keep=-1), "keep=-1"
    with pytest.raises(ValueError, match=re.escape(message)):
        offloaded(small.dit(), **options)


def test_a_model_without_blocks_is_refused():
    class Flat(nn.Module):
        def forward(self, x, t, text, image=None, y=None):
            return x

    with pytest.raises(ValueError, match="Flat, which has no list of blocks to stream"):
        offloaded(Flat())
