"""Does each frame get its window?  The reader's windows over films of several lengths."""

from itertools import pairwise

from ..extensions.windows import windows
from .verdict import attempted, exercise, expect, first_hint

FILMS = (41, 21, 4), (9, 5, 2), (17, 5, 0), (12, 5, 3), (5, 5, 2), (3, 5, 1)


@exercise("every frame has a window, neighbours share what was asked for, and the last ends with the film.")
def static_windows(answer):
    """The exercise of 20_windows.

    answer(frames, length, overlap) -> the static windows of a film, a list of lists of frames.
    """
    for film in FILMS:
        found, right = attempted(answer, *film), windows(*film, "static")
        frames, length, overlap = film
        at = f"for {frames} frames in windows of {length} that share {overlap}: "
        expect(
            isinstance(found, list | tuple)
            and all(isinstance(window, list | tuple | range) for window in found),
            f"{at}got {type(found).__name__}; expected a list of windows, each a list of frames",
        )
        found = [list(window) for window in found]
        expect(found == right, at + first_hint(_mistakes(found, right, *film), f"got {_short(found)}"))


def _mistakes(found, right, frames, length, overlap):
    """{what is wrong: is it so}, the likeliest first"""
    reached = {frame for window in found for frame in window}
    beyond = sorted(frame for frame in reached if not 0 <= frame < frames)
    missed = sorted(set(range(frames)) - reached)
    steps = {b[0] - a[0] for a, b in pairwise(found) if a and b}
    sizes = {len(window) for window in found}
    return {
        "a film no longer than a window is one window, of all its frames": len(right) == 1,
        f"frame {beyond[:1]} is not in the film; move the last window back until it ends with it": beyond,
        f"frame {missed[:1]} is in no window": missed,
        f"a window is shorter than {length}; the last one moves back instead": sizes - {length},
        "the windows are not in the order of time": sorted(found) == right,
        f"windows step by {length - overlap}, the frames that neighbours do not share": (
            steps and max(steps) != length - overlap
        ),
        "the same frames stand in two windows; the last may not come twice": len(found) > len(right),
    }


def _short(found):
    return ", ".join(f"{window[0]}..{window[-1]}" if window else "an empty one" for window in found)
