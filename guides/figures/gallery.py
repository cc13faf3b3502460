"""What do the tiny models' videos look like?  The README's animated pictures, from fixed prompts and seeds.

    python guides/figures/gallery.py -o guides/figures

Run it again when the weights have changed. The prompts were fixed before any was looked at, and every one is shown, right or wrong.
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


def draw(folder, pipe, prompts=None, **options):
    """Write one looping webp for each prompt, and `words.webp`: where each word of one prompt is heard.   -> the paths"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = prompts or PROMPTS
    paths = []
    for name, prompt in prompts.items():
        if name != WATCHED:
            paths.append(pipe(prompt, seed=SEED, **options).save(folder / f"{name}.webp"))
            continue
        steps = options.get("steps") or pipe.defaults["steps"]
        block, step = min(BLOCK, len(pipe.dit.blocks) - 1), steps // 2
        with moddiff.capture(
            pipe.dit, f"blocks.{block}.cross_attn.probs", steps=[step], branch="cond"
        ) as seen:
            video = pipe(prompt, seed=SEED, **options)
        paths.append(video.save(folder / f"{name}.webp"))
        told = [word for word in pipe.words(prompt) if word.text in ("red", "circle", "left", "black")]
        grid = pipe.grid_of(len(video), video.frames.shape[1:3])
        paths.append(
            word_animation(seen.visits[0][1][0], told, grid, video, size=128).save(folder / "words.webp")
        )
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
