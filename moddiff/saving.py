"""How does a file come to be there, whole or not at all?  One writer for all that is saved, and a trial
before the work."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError


def write_whole(path, data):
    """Put a file at a path in one motion: beside it first, then in its place. An interrupt leaves the old one
    or the new.

    path  a link is followed, and a file that is replaced passes on its permissions
    data  the bytes; or a function that writes them to the path it is given

    Raises OSError naming `path`, such as for a full disk.
    """
    path = Path(os.path.realpath(path))
    spare = _spare(path)
    try:
        os.close(os.open(spare, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # by the user's umask
        data(spare) if callable(data) else spare.write_bytes(data)
        if path.exists():
            os.chmod(spare, stat.S_IMODE(path.stat().st_mode))
        os.replace(spare, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors do not say that a disk is full.
        full = shutil.disk_usage(path.parent).free < 2**16
        code = errno.ENOSPC if full else getattr(error, "errno", None)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error
    finally:
        spare.unlink(missing_ok=True)


def _spare(path):
    """A short name beside a path; what a killed process left there more than an hour ago goes."""
    mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    for left in path.parent.glob(f".{mark}-*.part"):
        with suppress(FileNotFoundError):  # another process may clear away too
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    return path.with_name(f".{mark}-{secrets.token_hex(8)}.part")


def writable(path):
    """The path of a file that is going to be written, once a trial shows that it can be.

    `~` is the home folder; a folder that is missing is made.

    Raises ValueError for a name that cannot be one, OSError where no file can be written.
    """
    if os.name == "posix" and re.match(r"[A-Za-z]:[\\/]", str(path)):
        raise ValueError(
            f"{path} is a path of Windows, and this is not; expected one such as /home/me/out.mp4"
        )
    path = Path(path).expanduser()
    try:
        length = len(path.name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the file name {path.name!a} is not UTF-8; choose another") from None
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"{path} is a folder; name a file in it, such as {path / ('out' + path.suffix)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.stat(path)  # the spare name is short, and this one perhaps too long
        spare = _spare(path)
        try:
            spare.write_bytes(bytes(2**16))
        finally:
            spare.unlink(missing_ok=True)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"the file name {path.name[:30]}... has {length} bytes, more than this file system takes; "
                "choose a shorter one, of at most 255"
            ) from error
        raise OSError(error.errno, f"no file can be written there: {error.strerror}", str(path)) from error
    return path
