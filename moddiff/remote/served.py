"""What does a served component do for a question?  What its role promises, where the asker says it is."""

import time
from collections import OrderedDict
from contextlib import suppress

import torch

from ..contracts import ROLES, check_component, checked, device_of, fact
from ..fingerprints import fingerprint
from ..hooks import OneRun, UnknownTap, at
from ..telemetry import joined, span
from .looking import opened, told_taps
from .wire import VERSION, Malformed, brief, misfit, names, packed

OPS = {
    "text": ("encode", "tokens", "counts"),
    "image": ("encode",),
    "vae": ("encode", "decode"),
    "dit": ("prepare", "call"),
}
COORDINATES = "step", "sigma", "branch", "expert", "window"


class Served:
    """A component as others may ask it.

    role, part    it, and the role it plays
    prompts       how many prepared prompts it keeps; one that was forgotten is sent again
    runs          how many runs it knows apart: what extensions remember belongs to one
    """

    def __init__(self, role, part, prompts=4, runs=16):
        self.role, self.part = role, check_component(role, part)
        self.fingerprint = fingerprint(part)
        self.prompts, self.runs = _Last(prompts), _Last(runs)

    def described(self):
        """What the other end must know of it.   -> dict"""
        told = {name: fact(self.role, self.part, name) for name in ROLES[self.role].__annotations__}
        try:
            taps = told_taps(self.part)
        except UnknownTap:  # it shows nothing
            taps = {}
        return {
            "version": VERSION,
            "role": self.role,
            "fingerprint": self.fingerprint,
            "model": type(self.part).__name__,
            "facts": {name: value for name, value in told.items() if not callable(value)},
            "methods": [name for name, value in told.items() if callable(value)],
            "taps": taps,
        }

    def complaint(self, header):
        """Why this question is not for it, "" if it is."""
        return misfit(header, self.role, self.fingerprint)

    @torch.no_grad()
    def answer(self, header, tensors):
        """One question.   -> the pieces of a message, their bytes in all

        Raises Malformed for no question, or what the component raised.
        """
        op = header.get("op")
        if op not in OPS[self.role]:
            raise Malformed(f"op is {brief(op)}; expected one of {', '.join(OPS[self.role])}")
        started = time.perf_counter()
        with (
            joined(header.get("traceparent")),
            self._position(header.get("at", {})),
            span("serve.call", kind="server", role=self.role, op=op),
            opened(self.part, header.get("looks", []), tensors) as seen,
        ):
            inputs = _Inputs(tensors, device_of(self.part))
            told, out = getattr(self, f"_{self.role}_{op}")(header, inputs)
            visits, values = seen()
        told |= {"version": VERSION, "role": self.role, "fingerprint": self.fingerprint}
        # How long it took here: the rest of what the asker waited is the wire, and the line.
        told |= {"visits": visits, "seconds": time.perf_counter() - started}
        return packed(told, out | values)

    def _position(self, said):
        """The block in which an answer is computed: where the asker's run is.

        Its run becomes one of ours, by name, so that what a cache remembers of it is found at the next step.
        """
        if not isinstance(said, dict):
            raise Malformed(f"at is {brief(said)}; expected coordinates")
        here = {name: said[name] for name in COORDINATES if said.get(name) is not None}
        if (name := said.get("run")) is not None:
            # The same object for all steps of a run: what extensions remember hangs on it.
            here["run"] = self.runs.get(str(name)) or self.runs.put(str(name), OneRun(said.get("times")))
        return at(**here)

    # ---- what each role does ----------------------------------------------------------------------------

    def _text_encode(self, header, inputs):
        prompts = names(header.get("prompts"), "prompts")
        rows = checked("text", self.part, self.part.encode(prompts))
        out = {f"out.{i}": row for i, row in enumerate(rows)}
        # How many tokens each has, and how many were read: a run asks that too, and need not ask again.
        if (counts := fact("text", self.part, "counts")) is not None:
            out["counts"] = torch.tensor([counts(prompt) for prompt in prompts])
        return {}, out

    def _text_tokens(self, header, inputs):
        return self._text_told("tokens", header)

    def _text_counts(self, header, inputs):
        return self._text_told("counts", header)

    def _text_told(self, name, header):
        method = fact("text", self.part, name)
        if method is None:
            raise ValueError(f"this text encoder has no {name}")
        (prompt,) = names(header.get("prompts"), "prompts", 1)
        return {"result": method(prompt)}, {}

    def _image_encode(self, header, inputs):
        return {}, {"out": checked("image", self.part, self.part.encode(inputs["images"]))}

    def _vae_encode(self, header, inputs):
        return {}, {"out": self.part.encode(inputs["video"], **_options(header))}

    def _vae_decode(self, header, inputs):
        return {}, {"out": self.part.decode(inputs["latent"], **_options(header))}

    def _dit_prepare(self, header, inputs):
        prepare = fact("dit", self.part, "prepare")
        if prepare is None:
            raise ValueError("this denoiser prepares nothing; send the text with each call")
        self.prompts.put(str(header.get("prompt")), prepare(inputs.text(), inputs.get("image")))
        return {}, {}

    def _dit_call(self, header, inputs):
        given = {name: inputs[name] for name in inputs if not name.startswith(("text.", "looks."))}
        x, t = given.pop("x", None), given.pop("t", None)
        if x is None or t is None:
            raise Malformed("a call of a denoiser without x and t")
        # The branch that the asker is in, then those that it will ask for next, at the same x and t.
        texts = {None: self._prompt(header.get("prompt"), inputs)}
        texts |= {branch: self._prompt(name, inputs) for branch, name in _along(header).items()}
        if None in texts.values():
            return {"forgotten": True}, {}
        out = {}
        for branch, text in texts.items():
            with at(branch=branch), span("pass"):  # None: as the asker said, see `_position`
                velocity = self.part(x, t, text, **given, **_options(header))
            out["out" if branch is None else f"along.{branch}"] = velocity
        return {}, out

    def _prompt(self, name, inputs):
        """What a denoiser takes as text: from the question, or prepared under a name; None: forgotten"""
        return inputs.text() if name is None else self.prompts.get(str(name))


class _Inputs(dict):
    """The tensors of a question, where the component computes."""

    def __init__(self, tensors, device):
        super().__init__({name: x.to(device) for name, x in tensors.items()})

    def __missing__(self, name):  # dict calls it for self[name]; .get and `in` go past it
        raise Malformed(f"the tensor {name!r} is missing; there are {sorted(self)}")

    def text(self):
        """The rows of the prompts, in order; [] where a prepared prompt is meant."""
        return [self[name] for i in range(len(self)) if (name := f"text.{i}") in self]


def _options(header):
    options = header.get("options") or {}
    if not isinstance(options, dict) or not all(
        isinstance(value, bool | int | float | str | None) for value in options.values()
    ):
        raise Malformed(f"options are {brief(options)}; expected plain values by name")
    return options


def _along(header):
    """{branch: the name of its prompt} of the branches to compute along with the first."""
    along = header.get("along") or {}
    if not isinstance(along, dict) or not all(isinstance(name, str) for name in along.values()):
        raise Malformed(f"along is {brief(along)}; expected names of prompts by branch")
    return along


class _Last:
    """The last few of what was put in, by name."""

    def __init__(self, size):
        self.size, self.held = size, OrderedDict()

    def get(self, name):
        with suppress(KeyError):
            self.held.move_to_end(name)
        return self.held.get(name)

    def put(self, name, value):
        self.held[name] = value
        self.held.move_to_end(name)
        while len(self.held) > self.size:
            self.held.popitem(last=False)
        return value
