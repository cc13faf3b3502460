"""Do profiles do to a pipeline what they list, and is a slip told before anything is loaded?"""

import json
import re

import pytest
import small

import moddiff
from moddiff.extensions import offloaded, quantized, tiled
from moddiff.weights import profile, profiles

PROMPT = "a red circle moving left on a black background"
FEW = dict(seed=0, steps=2, frames=5, size=(32, 48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.release(tmp_path_factory.mktemp("release"))


def test_the_three_that_come_with_the_package():
    assert profiles() == ["base", "high_quality", "low_memory"]
    assert profile("base") == {} and set(profile("high_quality")) == {"dtype"}


def test_low_memory_is_what_its_calls_are(folder):
    plain, small_one = moddiff.load(folder), moddiff.load(folder, profile="low_memory")
    by_hand = plain.replace(
        text=offloaded(plain.text, keep=0, source="disk"),
        dit=offloaded(quantized(plain.dit, "int8"), keep=2),
        vae=tiled(plain.vae),
    )
    for part in ("text", "dit", "vae"):
        assert repr(getattr(small_one, part)) == repr(getattr(by_hand, part))
    assert (small_one(PROMPT, **FEW).frames == by_hand(PROMPT, **FEW).frames).all()


def test_base_and_high_quality_are_the_release_itself(folder):
    plain = moddiff.load(folder, dtype="fp32")(PROMPT, **FEW).frames
    for name in ("base", "high_quality"):
        assert (moddiff.load(folder, profile=name)(PROMPT, **FEW).frames == plain).all()
    half = moddiff.load(folder, profile="high_quality", dtype="bf16")
    assert next(half.dit.parameters()).dtype.itemsize == 2, "what is said goes before the profile"


def test_a_dictionary_and_a_file_of_ones_own(folder, tmp_path):
    calls = {"dit": [["quantized", "fp8", {"skip": "ffn"}]]}
    (tmp_path / "mine.json").write_text(json.dumps(calls))
    for which in (calls, tmp_path / "mine.json", str(tmp_path / "mine.json")):
        assert repr(moddiff.load(folder, profile=which).dit) == "quantized(DiT, 'fp8', skip='ffn')"


@pytest.mark.parametrize(
    "which, message",
    [
        ("lowmem", "there is no profile 'lowmem'; there are base, high_quality, low_memory, or the path of"),
        ("no/such.json", "there is no profile 'no/such.json'"),
        ({"unet": []}, "the profile has calls for 'unet'; expected "),
        ({"dit": "quantized"}, "the profile's calls for dit are 'quantized'; expected a list of lists"),
        ({"solver": "unipcc"}, "there is no solver component 'unipcc'; did you mean 'unipc'"),
        ({"dit": ["quantized"]}, "expected a list of lists"),
        ({"solver": "unipcc"}, "there is no solver component 'unipcc'; did you mean 'unipc'"),
        ({"dit": [["quantised", "int8"]]}, "there is no extension 'quantised'; did you mean 'quantized'?"),
    ],
)
def test_a_slip_is_told_before_anything_is_loaded(which, message, monkeypatch, folder):
    monkeypatch.setattr("moddiff.weights.loading.open_release", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        moddiff.load(folder, profile=which)


def test_a_file_that_is_no_profile_is_told(tmp_path, folder):
    path = tmp_path / "p.json"
    for text, message in (("{", "not readable JSON"), ("[]", "holds a list; expected an object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            moddiff.load(folder, profile=path)


def test_a_profiles_dtype_is_checked_as_any(folder):
    with pytest.raises(ValueError, match="fp12"):
        moddiff.load(folder, profile={"dtype": "fp12"})
