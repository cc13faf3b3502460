"""Do the figures of the guide on caches measure what they say, and does the guide show those on file?"""

import json
from pathlib import Path

import cache_curve
import numpy as np
import pytest
import small

GUIDES = Path(__file__).parents[1] / "guides"
FACTS = json.loads((GUIDES / "figures" / "cache.json").read_text(encoding="utf-8"))


def planted(right, shift):
    frames = np.full((2, 4, 4, 3), 100 + shift, dtype=np.uint8)
    return {"frames": frames} | {name: np.array(right) for name in cache_curve.ASKED}


def test_the_guide_has_the_tables_of_the_file():
    guide = (GUIDES / "cache.md").read_text(encoding="utf-8")
    for table in cache_curve.tables(FACTS):
        assert table in guide
    assert f"-n {FACTS['prompts']} -o guides/figures/cache.json" in guide


def test_every_policy_has_five_thresholds_on_file_and_rivals():
    of = {}
    for row in FACTS["rows"]:
        of.setdefault(row["policy"], []).append(row["at"])
    for policy, (thresholds, _) in cache_curve.POLICIES.items():
        assert of[policy] == list(thresholds) and len(thresholds) == 5
    assert of["fewer steps"] == list(cache_curve.STEPS) and of["plain"] == [0]
    assert all(0 <= row["saved"] < 1 and 0 <= row["all"] <= 1 for row in FACTS["rows"])
    saved = {(row["policy"], row["at"]): row["saved"] for row in FACTS["rows"]}
    for policy, (thresholds, _) in cache_curve.POLICIES.items():
        rising = [saved[policy, threshold] for threshold in thresholds]
        assert rising == sorted(rising), policy


def test_what_the_guide_says_of_each_policy_is_so_on_file():
    """Nearer to the full run than fewer steps at the same number of passes, or not; and how many obey."""
    of = {}
    for row in FACTS["rows"]:
        of.setdefault(row["policy"], []).append(row)
    rival = of["fewer steps"]
    saved, psnr = [row["saved"] for row in rival], [row["psnr"] for row in rival]

    def nearer(policy):
        """{share saved: by how many dB}, where the rival was measured on both sides"""
        rows = [row for row in of[policy] if saved[0] - 0.02 <= row["saved"] <= saved[-1]]
        return {row["saved"]: row["psnr"] - np.interp(row["saved"], saved, psnr) for row in rows}

    assert min(nearer("teacache").values()) > 0 and min(nearer("easycache").values()) > 0
    assert max(nearer("first-block").values()) < 0
    magcache = nearer("magcache")
    assert all(gain < 0 for at, gain in magcache.items() if at < 0.4)
    assert all(gain > 0 for at, gain in magcache.items() if at > 0.46)
    plain = of["plain"][0]["all"]
    for policy in cache_curve.POLICIES:
        assert all(row["all"] > plain - 1.5 / 64 for row in of[policy] if row["saved"] <= 0.5), policy
    late, early = [[row["psnr"] for row in of[when]] for when in ("late", "early")]
    assert all(7.5 < a - b < 11.5 for a, b in zip(late, early, strict=True))


def test_figures_are_shares_and_a_median():
    plain = [planted(True, 0)] * 3
    row = cache_curve.figures([planted(True, 1), planted(False, 1), planted(True, 2)], plain)
    assert row["all"] == pytest.approx(2 / 3) and row["psnr"] == pytest.approx(48.13, abs=0.01)
    assert cache_curve.figures(plain, plain)["psnr"] is None


def test_the_command_keeps_its_films_and_goes_on(tmp_path, monkeypatch, capsys):
    pipe, made, film = small.pipeline(tmp_path), [], cache_curve.film

    def counted(*inputs):
        made.append(inputs[2])
        return film(*inputs)

    monkeypatch.setattr("moddiff.load", lambda model: pipe, raising=False)
    monkeypatch.setattr(cache_curve, "film", counted)
    monkeypatch.setattr(cache_curve, "POLICIES", {"first-block": ((0.1, 0.9), {})})
    monkeypatch.setattr(cache_curve, "SETTINGS", [("first-block", 0.1), ("first-block", 0.9)])
    monkeypatch.setattr(cache_curve, "STEPS", (2,))
    out = tmp_path / "cache.json"
    cache_curve.main(["-n", "1", "-o", str(out)])
    assert len(made) == 8  # plain, two thresholds, two early, two late, one of fewer steps
    cache_curve.main(["-n", "2", "-o", str(out)])
    assert len(made) == 16  # the first prompt's films were kept
    facts = json.loads(out.read_text())
    rows = {(row["policy"], row["at"]): row for row in facts["rows"]}
    assert facts["prompts"] == 2 and facts["steps"] == 3
    assert rows["fewer steps", 2]["saved"] == pytest.approx(1 / 3)
    assert rows["early", 8]["saved"] == pytest.approx(2 / 3)  # all but the first of three
    assert "| early | 8 | 67 % |" in capsys.readouterr().out
