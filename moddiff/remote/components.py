"""What stands in a pipeline for a part that runs elsewhere?  One of the same role, and of the same taps.

What a pipeline must know of it (`contracts.fact`) the server has told when it was connected. What comes back
is checked here as the role promises it, before the run goes on with it.
"""

import secrets
import uuid
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..contracts import ROLES, checked, fact
from ..hooks import position
from ..roles import came_from
from ..telemetry import span
from ..text import as_list
from .branches import Branches
from .client import Server
from .encodings import Encodings
from .looking import delivered, hang_taps, written
from .wire import RemoteError, brief

_runs = WeakKeyDictionary()  # OneRun -> its name on the wire, drawn, so that two clients never have one run


def connect(url, role, token=None, timeout=60.0, cache=None):
    """The component of that role that runs at `url`: see `moddiff.remote`."""
    if role not in KINDS:
        raise ValueError(f"role={role!r}; expected one that may run elsewhere: {', '.join(KINDS)}")
    part = KINDS[role](Server(url, role, token, timeout), cache)
    return came_from(part, remote=url, timeout=timeout, cache=cache)  # the token is nobody else's business


class Elsewhere(nn.Module):
    """What all of them share.

    server       where it runs;  fingerprint: of the weights it has there
    device       of this end: what comes back is on the CPU
    """

    role = None
    device = torch.device("cpu")

    def __init__(self, server, cache=None):
        super().__init__()
        self.server, told = server, server.describe()
        lacking = [name for name in ("fingerprint", "facts", "taps") if name not in told]
        if lacking or told.get("role") != self.role:
            raise RemoteError(f"{server}: it described itself as {brief(told)}; is it a `moddiff serve`?")
        self.fingerprint = told["fingerprint"]
        for name, value in told["facts"].items():
            if name in ROLES[self.role].__annotations__:  # and nothing else of ours, whatever a server tells
                setattr(self, name, _as_it_was(value))
        self.methods = frozenset(told.get("methods", ()))
        for name in ROLES[self.role].__annotations__:
            # What the one over there cannot do, this one cannot either.
            if callable(getattr(type(self), name, None)) and name not in self.methods:
                setattr(self, name, None)
        self._taps = hang_taps(self, told["taps"])
        self.cache = None if cache is None else Encodings(cache)

    def __repr__(self):
        return f"{type(self).__name__}({self.server}, {self.fingerprint})"

    def asked(self, op, tensors=None, *, looking=True, **told):
        """Ask the component at the other end.   -> (header of the answer, {name: tensor})"""
        return self.put(op, *self.question(tensors or {}, looking, told))

    def question(self, tensors, looking, told, counting=True):
        """All of a question: who looks inside, its tensors, and what its header tells.

        It is kept apart from putting it, so that the one that prepared a prompt can be put again.
        """
        asked, values = written(self._taps, counting=counting) if looking else ([], {})
        return asked, tensors | values, told | {"at": _here(), "looks": [spec for _, _, spec in asked]}

    def put(self, op, asked, tensors, told):
        """Put a question, and on record what was seen inside.   -> (header of the answer, {name: tensor})

        asked  who looks, as `written` says it;  tensors, told: what travels
        """
        names = {"role": self.role, "op": op, "server.address": self.server.host}
        with span("remote.call", kind="client", **names):
            answer, back = self.server.ask(self.fingerprint, op, tensors, **told)
        if not asked:
            return answer, back
        try:
            delivered(asked, answer.get("visits", []), back)
        except (IndexError, AttributeError, KeyError) as error:
            raise RemoteError(f"{self.server}: what was seen inside does not fit ({error!r})") from None
        return answer, back

    def encoded(self, op, tensors, **told):
        """As `asked`, or from the folder of encodings.   -> {name: tensor}

        Who looks inside wants it computed.
        """
        if self.cache is None or any(tap.live for tap in self._taps):
            return self.asked(op, tensors, **told)[1]
        key = self.cache.key(self.fingerprint, op, tensors, told)
        back = self.cache.get(key)
        if back is None:
            back = self.asked(op, tensors, **told)[1]
            self.cache.put(key, back)
        return back

    def one(self, tensors, name="out"):
        """The tensor of that name in an answer."""
        if name not in tensors:
            raise RemoteError(
                f"{self.server}: the answer holds {sorted(tensors)}; expected the tensor {name!r}"
            )
        return tensors[name]


def _as_it_was(value):
    """A fact as its component has it: JSON knows no tuples."""
    if isinstance(value, dict):
        return {name: _as_it_was(each) for name, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _here():
    """Where the run is, as it travels: caches and edits over there go by it."""
    now = position()
    if (run := now.pop("run", None)) is not None:
        if run not in _runs:
            _runs[run] = uuid.uuid4().hex
        now["run"], now["times"] = _runs[run], run.times  # with each question: the server may be a new one
    return now


def _plain(options):
    """Options that travel: plain values.   Raises TypeError for others."""
    for name, value in options.items():
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(
                f"{name}={brief(value)} does not travel to where the component runs; expected a tensor "
                "or a plain value"
            )
    return options


# ---- the roles ------------------------------------------------------------------------------------------


class Text(Elsewhere):
    """A text encoder elsewhere: see contracts.TextEncoder."""

    role = "text"

    def encode(self, prompts):
        """[str] -> list of [l, d], one per prompt"""
        prompts = as_list(prompts)
        if odd := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise TypeError(
                f"a prompt must be a str, but this one is {type(odd[0]).__name__}: {brief(odd[0])}"
            )
        back = self.encoded("encode", {}, prompts=prompts)
        return checked("text", self, [back[name] for name in _numbered(back, "out")], prompts=len(prompts))

    def tokens(self, prompt):
        """str -> [(id, piece)]"""
        return self._told("tokens", prompt, lambda rows: [(int(i), str(piece)) for i, piece in rows])

    def counts(self, prompt):
        """str -> (tokens read, tokens there are)"""
        # Kept with the encoding, which a run wants next: with a folder of encodings there is one question.
        kept = self.encoded("encode", {}, prompts=[prompt]).get("counts") if self.cache else None
        if kept is None:
            return self._told("counts", prompt, lambda pair: (int(pair[0]), int(pair[1])))
        if kept.shape != (1, 2) or kept.is_floating_point():
            raise RemoteError(f"{self.server}: its counts are {brief(kept)}; expected two numbers")
        return tuple(kept[0].tolist())

    def _told(self, op, prompt, made):
        """What a method without tensors answers, made into what its role promises."""
        answer, _ = self.asked(op, looking=False, prompts=[prompt])
        result = answer.get("result")
        try:
            return made(result)
        except (TypeError, ValueError, IndexError, KeyError):
            raise RemoteError(
                f"{self.server}: its {op} are {brief(result)}; expected "
                f"{'pairs of id and piece' if op == 'tokens' else 'two numbers'}; is it the same moddiff?"
            ) from None


class Image(Elsewhere):
    """An image encoder elsewhere: see contracts.ImageEncoder."""

    role = "image"

    def encode(self, images):
        """[b, 3, H, W] in [-1, 1] -> [b, n, d]"""
        return checked("image", self, self.one(self.encoded("encode", {"images": images})), batch=len(images))


class Vae(Elsewhere):
    """A video codec elsewhere: see contracts.VideoCodec."""

    role = "vae"

    def encode(self, video, **options):
        """[b, 3, F, H, W] in [-1, 1] -> [b, z, f, h, w]"""
        back = self.encoded("encode", {"video": video}, options=_plain(options))
        return checked("vae", self, self.one(back), "encode", shape=(len(video), self.channels, *"fhw"))

    def decode(self, latent, **options):
        """[b, z, f, h, w] -> [b, 3, F, H, W] in [-1, 1]"""
        # The first latent frame is one frame, each other one `ft`: see vae/.
        (ft, fh, fw), (f, h, w) = fact("vae", self, "stride"), latent.shape[-3:]
        _, back = self.asked("decode", {"latent": latent}, options=_plain(options))
        shape = len(latent), 3, (f - 1) * ft + 1, h * fh, w * fw
        return checked("vae", self, self.one(back), "decode", shape=shape, finite=_finite(latent))


class Prompt:
    """What a denoiser elsewhere prepared, and keeps there under `name`: the question by which it did so.

    Where it was forgotten, as by a server that began anew, the same question is put again.
    """

    def __init__(self, name, tensors, told):
        self.name, self.tensors, self.told = name, tensors, told


class Dit(Elsewhere):
    """A denoiser elsewhere: see contracts.Denoiser.

    A prompt is prepared there, once, and only its name goes along with each call.
    """

    role = "dit"

    def __init__(self, server, cache=None):
        super().__init__(server, cache)
        self.branches = Branches()

    def prepare(self, text, image=None):
        """All about prompt and image that no step changes.   -> what `forward` takes as text"""
        name = secrets.token_hex(8)  # each its own: what was patched in one is not in another
        # Not counting: a prompt passes few of the taps, so nobody has missed the moment that they wait for.
        asked, tensors, told = self.question(
            _named(text, image=image), True, {"prompt": name}, counting=False
        )
        self.put("prepare", asked, tensors, told)
        return Prompt(name, tensors, told)

    def forward(self, x, t, text, image=None, y=None, **options):
        prompt = text if isinstance(text, Prompt) else None
        tensors = _named([] if prompt else text, x=x, t=t, image=image, y=y)
        # What an extension adds, such as VACE's control, travels by what it is.
        for name in [name for name, value in options.items() if torch.is_tensor(value)]:
            tensors[name] = options.pop(name)
        ask = partial(self._velocities, x, tensors, _plain(options), prompt)
        if prompt is None or any(tap.live for tap in self._taps):
            return ask({})[0]  # who looks inside sees each branch as it is asked for
        return self.branches.velocity(prompt, tensors | options, ask, self.server.timeout)

    def _velocities(self, x, tensors, options, prompt, along):
        """A question about a branch, and others along {name: Prompt}.   -> velocity, {name: velocity}"""
        told = {"options": options, "prompt": prompt and prompt.name}
        names = {branch: other.name for branch, other in along.items()}
        answer, back = self.asked("call", tensors, **told, along=names)
        if answer.get("forgotten") and prompt:
            # Alone: where many ask, a second prompt could be forgotten again before the first is used.
            along = {}
            self.put("prepare", [], prompt.tensors, prompt.told)
            answer, back = self.asked("call", tensors, **told)
        shape = (len(x), fact("dit", self, "channels") or x.shape[1], *x.shape[2:])
        promised = partial(checked, "dit", self, shape=shape, finite=_finite(x))
        others = {branch: promised(self.one(back, f"along.{branch}")) for branch in along}
        return promised(self.one(back)), others


def _named(text, **tensors):
    named = {f"text.{i}": part for i, part in enumerate(text)}
    return named | {name: value for name, value in tensors.items() if value is not None}


def _numbered(tensors, prefix):
    """The names prefix.0, prefix.1, ... as far as they go."""
    count = sum(name.startswith(prefix + ".") for name in tensors)
    return [name for i in range(count) if (name := f"{prefix}.{i}") in tensors]


def _finite(x):
    """Is finite what was sent?  Else what comes back need not be."""
    return x.device.type == "cpu" and bool(x.isfinite().all())


KINDS = {"text": Text, "image": Image, "dit": Dit, "vae": Vae}
