"""Does the table of seams measure what it says?  On a small random model, against a comparison by hand."""

import re
from pathlib import Path

import seams
import small
import torch

from moddiff.extensions import tile, tiled

ROOT = Path(__file__).parents[1]


@torch.no_grad()
def test_a_row_is_the_difference_to_the_whole_decode(tmp_path):
    vae, ramp = small.pipeline(tmp_path).vae, tile.ramp
    latents = [(x, vae.decode(x)) for x in torch.randn(2, 1, small.Z, 2, 4, 6)]
    found, tiles = seams.difference(vae, latents, 16, 8)
    apart = torch.stack([(tiled(vae, (16, 16), (8, 8)).decode(x) - whole).abs() for x, whole in latents])
    assert found == {"max": float(apart.max()), "mean": float(apart.mean())} and tiles == 3 * 5
    other, _ = seams.difference(vae, latents, 16, 8, seams.plain_ramp)
    assert other != found and tile.ramp is ramp
    assert seams.difference(vae, latents, 64, 0)[0] == {"max": 0.0, "mean": 0.0}


def test_the_plain_ramps_of_two_neighbours_are_one_together():
    left, right = seams.plain_ramp(0, 16, 0, 8), seams.plain_ramp(8, 24, 8, 0)
    torch.testing.assert_close(left[8:] + right[:8], torch.ones(8))
    assert left[-1] > 0 == tile.ramp(0, 16, 0, 8)[-1]


@torch.no_grad()
def test_without_the_attention_a_change_is_heard_less_far(tmp_path):
    vae = small.pipeline(tmp_path).vae
    whole, near = seams.heard(vae), seams.heard(seams.seen_near_only(vae))
    assert whole[176] > 0 and near[0] > 0 == near[176]
    assert [*near.values()] == sorted(near.values(), reverse=True)


def test_the_guide_shows_the_table_as_it_was_measured():
    text = (ROOT / "guides" / "offload.md").read_text(encoding="utf-8")
    facts = seams.json.loads((ROOT / "guides" / "figures" / "seams.json").read_text(encoding="utf-8"))
    lines = seams.error_table(facts).splitlines()
    assert len(lines) == 2 + len(seams.OVERLAPS) and re.fullmatch(r"[|\- ]+", lines[1])
    assert not [line for line in lines if line not in text.splitlines()]
