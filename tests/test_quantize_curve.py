"""Does the table of the guide on quantization measure what it says?  On planted films and a small model."""

import json

import numpy as np
import pytest
import quantize_curve
import small


def planted(right, shift):
    frames = np.full((2, 4, 4, 3), 100 + shift, dtype=np.uint8)
    return {"frames": frames} | {name: np.array(right) for name in quantize_curve.ASKED}


def test_the_figures_are_shares_and_distances_from_the_plain_films():
    plain = [planted(True, 0), planted(True, 0)]
    rows = quantize_curve.figures([planted(True, 1), planted(False, 1)], plain)
    assert rows["all"] == rows["motion"] == 0.5 and rows["psnr"] == pytest.approx(48.13, abs=0.01)
    assert "psnr" not in quantize_curve.figures(plain, plain)


def test_the_command_keeps_its_films_and_goes_on(tmp_path, monkeypatch, capsys):
    pipe, made, film = small.pipeline(tmp_path), [], quantize_curve.film

    def counted(*inputs):
        made.append(inputs[1])
        return film(*inputs)

    monkeypatch.setattr("moddiff.load", lambda model: pipe, raising=False)
    monkeypatch.setattr(quantize_curve, "film", counted)
    monkeypatch.setattr(quantize_curve, "KINDS", ("plain", "int8", "fp8"))
    monkeypatch.setattr(quantize_curve, "ENCODERS", ("int8", "fp8"))
    out = tmp_path / "curve.json"
    quantize_curve.main(["-n", "1", "-o", str(out)])
    assert len(made) == 3
    quantize_curve.main(["-n", "2", "-o", str(out)])
    assert len(made) == 6  # the first prompt's films were kept
    facts = json.loads(out.read_text())
    assert facts["prompts"] == 2 and 0 < facts["kinds"]["int8"]["error"] < facts["kinds"]["fp8"]["error"]
    assert "plain" in capsys.readouterr().out
