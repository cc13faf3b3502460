"""How does one part of a pipeline run on another node?  On a Ray actor, and without HTTP.

It is the component of `remote/`, with the same messages and checks; only the way that they travel is Ray's.
So its taps work as there: captures and the declared edits are done over there, a Python function as a patch
is refused, and gradients do not travel.
"""

import torch

from ..remote.client import REFUSALS
from ..remote.components import KINDS
from ..remote.served import Served
from ..remote.wire import VERSION, Malformed, RemoteError, misfit, packed, unpacked
from ..telemetry import traceparent
from ..weights import load
from .starting import joined, load_words


def actor(role, model="tiny", *, threads=1, timeout=60.0, cache=None, address=None, **where):
    """A component in a process of its own, on a node that has room: `pipe.replace(text=actor("text"))`.

    role     "text", "image", "dit" or "vae"
    model    a name or folder, or a dict of arguments of `moddiff.load`; the other parts are let go there
    threads  of torch over there, the CPUs it takes
    timeout  seconds for each question, the loading too;  cache: a folder of encodings, as for moddiff.remote
    address  of the cluster, as for `generate`
    where    on which node, in Ray's own words: num_gpus=1, resources={"big": 1}, scheduling_strategy=...
    ->       a component of that role; the process ends with the last of it, or with this one

    Raises ValueError for a role that there is not, ConnectionError without a cluster, ImportError without
    Ray, RemoteError where no node has room for it within the time; what `moddiff.load` raises over there.
    """
    if role not in KINDS:
        raise ValueError(f"role={role!r}; expected one of {', '.join(KINDS)}")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout!r}; expected seconds, above 0")
    words = load_words(model)
    ray, _ = joined(address)
    kind = ray.remote(num_cpus=threads)(Part)
    part = kind.options(**where).remote(role, words, threads)
    return KINDS[role](Line(ray, part, role, timeout), cache)


class Part:
    """A component and who asks it, over there."""

    def __init__(self, role, model, threads):
        torch.set_num_threads(threads)
        self.role, self.model = role, model

    def describe(self):
        """Load it.   -> what the other end must know of it"""
        pipe = load(**self.model)
        if pipe.components[self.role] is None:
            raise ValueError(f"{self.model['where']} has no {self.role} component")
        self.served = Served(self.role, pipe.components[self.role])
        return self.served.described()

    def answer(self, message):
        """A message -> a message."""
        header, tensors = unpacked(message)
        if complaint := self.served.complaint(header):
            raise Malformed(complaint)
        pieces, _ = self.served.answer(header, tensors)
        return b"".join(pieces)


class Line:
    """To one Part: what remote.client.Server is to a server."""

    def __init__(self, ray, part, role, timeout):
        self.ray, self.part, self.role, self.timeout, self.host = ray, part, role, timeout, "actor"

    def __deepcopy__(self, memo):
        return self  # a copy of a component asks the same actor

    def __repr__(self):
        return f"actor ({self.role})"

    def describe(self):
        return self._got(self.part.describe.remote(), "is there a node that has room for it?")

    def ask(self, fingerprint, op, tensors, **told):
        """One message there and one back.   -> (header, {name: tensor})

        Raises RemoteError; or what the component raised about its inputs.
        """
        header = {"version": VERSION, "role": self.role, "fingerprint": fingerprint, "op": op}
        header |= {"deadline": self.timeout, "traceparent": traceparent()} | told
        pieces, _ = packed(header, tensors)
        back = self.part.answer.remote(b"".join(pieces))
        answer, tensors = unpacked(self._got(back, "give timeout= more seconds, or ask for less"))
        if complaint := misfit(answer, self.role, fingerprint):
            raise RemoteError(f"{self}: the answer does not fit: {complaint}")
        return answer, tensors

    def _got(self, ref, advice):
        """What the actor answers; its errors are those of a component here."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(ref, timeout=self.timeout)
        except errors.GetTimeoutError:
            raise RemoteError(f"{self}: no answer within {self.timeout:g} s; {advice}") from None
        except errors.RayTaskError as raised:
            kinds = [kind.__name__ for kind in type(raised.cause).__mro__ if kind.__name__ in REFUSALS]
            if not kinds:
                raise RemoteError(f"{self}: {type(raised.cause).__name__}: {raised.cause}") from None
            raise REFUSALS[kinds[0]](f"{raised.cause} (said by {self})") from None
        except errors.RayError as gone:
            raise RemoteError(
                f"{self}: its process or its node is gone ({gone}). A run goes on from its last step with "
                "moddiff.resume(pipe, state)"
            ) from None
