"""Does the same run give the same bytes today?  A run on record, made again, and what differs if it does not.

    moddiff.experiments.again("runs.sqlite", 3)         # or: moddiff runs again 3

The guide is guides/pipeline.md.
"""

import warnings
from dataclasses import dataclass, field

from ..settings import Note
from ..video import Video
from .keeping import machine, versions, with_fingerprints
from .kept import closeness, run
from .recipes import lost, made, objects_in, recipe


class NotRepeatable(ValueError):
    """A run cannot be made again, or would not be the same run; the message says why."""


@dataclass(frozen=True)
class Again:
    """A run made again.

    video    what came out now
    same     are its bytes those on record?
    close    how close it is to the one on record, in words
    differs  what is other than it was, in words: fingerprints, versions, the machine
    """

    number: int
    video: Video = field(repr=False)
    same: bool
    close: str
    differs: tuple

    def __str__(self):
        if self.same:
            return f"run {self.number} again: the same bytes"
        why = "; ".join(self.differs) or "nothing that is on record differs"
        return f"run {self.number} again: other bytes ({self.close}); {why}"


def again(file, number, anyway=False, progress=None):
    """Make a run again: its parts anew, with the settings, pictures and rewritten prompt on record.

    anyway  go on where a part has another fingerprint than it had
    ->      Again

    Raises NotRepeatable, before the work, for a run whose parts have no words that make them, that was made
    under a patch or did not end well, or whose parts are others now; LookupError for a number there is not.
    """
    past = run(file, number)
    if why := obstacles(past):
        raise NotRepeatable(f"run {number} cannot be made again: {'; '.join(why)}")
    pipe = made(past.record["pipeline"])
    others = changed_parts(past, pipe)
    if others and not anyway:
        raise NotRepeatable(
            f"run {number} would not be the same: {'; '.join(others)}. To see what comes out all the same: "
            "anyway=True, on the command line --anyway"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # the video carries them
        video = pipe(past.prompt, progress=progress, **past.options())
    differs = (*others, *changed_around(past, pipe))
    return Again(number, video, video == past.video, closeness(video, past.video), differs)


def obstacles(past):
    """Why a run cannot be made again, in words; [] where it can."""
    if past.status != "done":
        return [f"it {past.status} ({past.error})" if past.status == "failed" else "it was interrupted"]
    why = lost(past.record["pipeline"])
    for name, words in past.record["asked"].items():
        if objects_in(words):
            why.append(f"{name}= was made by hand, and no JSON makes it: {objects_in(words)}")
    return why + [f"it was made under a {patch}, which is code" for patch in past.record["patches"]]


def changed_parts(past, pipe):
    """Which parts of a pipeline are not those of a run, by their fingerprints."""
    now = with_fingerprints(recipe(pipe), pipe)["parts"]
    return [
        f"the {role} component ({part['shown']}) has the fingerprint {now[role]['fingerprint']}, and had "
        f"{part['fingerprint']}: other weights, or another config"
        for role, part in past.parts.items()
        if part["fingerprint"] != now[role]["fingerprint"]
    ]


def changed_around(past, pipe):
    """Which versions, and what of the machine, are not those of a run."""
    then = past.versions | past.machine
    now = versions() | machine(pipe)
    return [
        f"{name} is {now.get(name, 'absent')}, and was {then.get(name, 'absent')}"
        for name in then | now
        if then.get(name) != now.get(name)
    ]
