"""The README's pictures come from one command, from prompts that the tiny world knows, and all are shown."""

import re
from pathlib import Path

import gallery
import pytest
import small
from PIL import Image

from moddiff.tiny import world

ROOT = Path(__file__).parents[1]


def test_every_prompt_is_understood_and_three_of_the_first_four_were_never_trained_on():
    scenes = [world.parse(prompt) for prompt in gallery.PROMPTS.values()]
    assert None not in scenes
    assert [world.held_out(scene.things[0]) for scene in scenes[:4]] == [False, True, True, True]
    assert {gallery.WATCHED} <= set(gallery.PROMPTS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    prompts = {name: gallery.PROMPTS[name] for name in ("circle", "star")}
    return gallery.draw(folder / "new", small.pipeline(folder), prompts)


def test_each_prompt_becomes_a_looping_picture_and_one_shows_its_words(pictures):
    assert [path.name for path in pictures] == ["circle.webp", "words.webp", "star.webp"]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.n_frames == small.FRAMES and picture.info["loop"] == 0
    sizes = [Image.open(path).size for path in pictures[:2]]
    assert sizes[1][0] > 4 * sizes[0][0], "four words beside the video"


def test_the_readme_shows_every_picture_of_the_gallery_with_its_prompt():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r'src="guides/figures/(\w+)\.webp"', text)
    assert sorted(shown) == sorted([*gallery.PROMPTS, "words"])
    for name, prompt in gallery.PROMPTS.items():
        assert prompt in text and (ROOT / "guides" / "figures" / f"{name}.webp").exists()
    assert "python guides/figures/gallery.py -o guides/figures" in text
