"""What do the tiny models' videos look like?  The README's animated pictures, from fixed prompts and seeds.

    python guides/figures/gallery.py -o guides/figures

Run it again when the weights have changed. The prompts were fixed before any was looked at, and every one is
shown, right or wrong.
"""

import argparse
from pathlib import Path

import moddiff
from moddiff.viz.maps import word_animation

SEED = 0
PROMPTS = {  # file name: prompt. The second, third and fourth are combinations that training never showed
    "circle": "a red circle moving left on a black background",
    "star": "a green star moving left on a gray background",
    "triangle": "a yellow triangle growing on a brown background",
    "square": "a red square moving right on a navy background",
    "two": "a blue square moving right above an orange circle moving left on a black background",
    "deutsch": "ein violetter Kreis, der sich nach unten bewegt, auf grauem Hintergrund",
    "zhongwen": "深蓝色背景上，一个橙色的三角形逐渐变小",
}
WATCHED = "circle"  # whose words are also shown where they are heard
BLOCK = 3  # in the middle of the DiT, at the middle step


def draw(folder, pipe, prompts=PROMPTS):
    """Write a looping webp for each prompt, and `words.webp`: where words of one are heard.   -> the paths"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, prompt in prompts.items():
        taps = f"blocks.{min(BLOCK, len(pipe.dit.blocks) - 1)}.cross_attn.probs"
        middle = pipe.defaults["steps"] // 2
        with moddiff.capture(pipe.dit, taps, steps=[middle], branch="cond") as seen:
            video = pipe(prompt, seed=SEED)
        paths.append(video.save(folder / f"{name}.webp"))
        if name == WATCHED:
            watched = [word for word in pipe.words(prompt) if word.text in ("red", "circle", "left", "black")]
            probs = seen.visits[0][1][0]
            film = word_animation(probs, watched, pipe.grid, video, size=128)
            paths.append(film.save(folder / "words.webp"))
    return paths


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python guides/figures/gallery.py", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("-o", "--output", default="guides/figures", help="the folder for the pictures")
    folder = parser.parse_args(arguments).output
    for path in draw(folder, moddiff.load("tiny")):
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
