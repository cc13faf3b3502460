"""Must the same prompt be encoded twice?  A folder of encodings, each under the hash of what it is made from.

Files are whole or not there. One that was damaged since is computed again, and a Note says so.
"""

import hashlib
import json
import warnings
from pathlib import Path

from ..fingerprints import fingerprint
from ..saving import write_whole
from ..settings import Note
from .wire import Malformed, packed, unpacked


class Encodings:
    """A folder of what a component elsewhere computed.   folder: made when the first one is kept"""

    def __init__(self, folder):
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cache={str(folder)!r} is a file; expected a folder for encodings")

    def key(self, model, op, tensors, told):
        """The name of what this model makes of these inputs."""
        inputs = {name: fingerprint(x) for name, x in tensors.items()}
        return hashlib.blake2b(json.dumps([model, op, inputs, told]).encode(), digest_size=16).hexdigest()

    def get(self, key):
        """The tensors kept under a name, or None."""
        file = self.folder / key[:2] / f"{key}.safetensors"
        try:
            header, tensors = unpacked(file.read_bytes())
        except FileNotFoundError:
            return None
        except (Malformed, OSError) as error:
            return self._damaged(file, error)
        if header != {"key": key, "digests": _digests(tensors)}:
            return self._damaged(file, "its bytes have changed")
        return tensors

    def put(self, key, tensors):
        file = self.folder / key[:2] / f"{key}.safetensors"
        pieces, _ = packed({"key": key, "digests": _digests(tensors)}, tensors)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, b"".join(pieces))
        except OSError as error:  # the run goes on: what was to be kept is there all the same
            warnings.warn(f"the encoding was not kept: {error}", Note, stacklevel=4)

    def _damaged(self, file, why):
        warnings.warn(f"{file} is damaged ({why}) and is computed again", Note, stacklevel=5)
        return None


def _digests(tensors):
    return {name: fingerprint(x) for name, x in sorted(tensors.items())}
