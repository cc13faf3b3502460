"""Where is what was done kept?  One SQLite file for experiments and for runs.

SQLite in WAL mode: what was written is on disk when its line returns, and safe against kill -9. A second
process that writes is waited for, and a run goes in as a whole or not at all.
"""

import os
import sqlite3
import time
import zlib
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from ..saving import writable

# The tables of version 0.1 are the first two; such a file says neither who made it nor in which version.
SCHEMA = """
create table if not exists experiment (
    id integer primary key, name text not null, started real not null, ended real, status text not null,
    host text, pid integer, note text
);
create table if not exists entry (
    id integer primary key, experiment integer not null references experiment(id), at real not null,
    kind text not null, name text not null, value text, blob blob
);
create index if not exists entry_of on entry (experiment, kind);
create table if not exists run (
    id integer primary key, experiment integer references experiment(id), started real not null,
    seconds real not null, status text not null, model text not null, prompt text not null, error text,
    video text, record text not null
);
create table if not exists data (
    digest text not null, piece integer not null, bytes blob not null, primary key (digest, piece)
);
"""
OLD = {"experiment", "entry"}
OURS = int.from_bytes(b"mdif")  # SQLite's application_id: whose file is this?
VERSION = 2
PATIENCE = 30.0  # seconds to wait for another process that writes
PIECE = 64 << 20  # SQLite takes up to 1 GB in one field


def connect(file):
    """The file, created where there is none, such that each statement is on disk when it returns.

    Raises ValueError if there can be no such file, or if there is one that is something else, or of a newer
    moddiff; OSError if nothing can be written there.
    """
    end, db = time.monotonic() + PATIENCE, None
    while True:
        try:
            # Experiments may end in another thread than they began in.
            db = db or sqlite3.connect(file, PATIENCE, isolation_level=None, check_same_thread=False)
            if _version(db, file) < VERSION:
                db.execute("pragma journal_mode = wal")
                made = f"pragma application_id = {OURS}; pragma user_version = {VERSION};"
                db.executescript(f"begin immediate; {SCHEMA} {made} commit;")
            db.execute("pragma synchronous = full")
            return db
        except sqlite3.Error as error:
            # While another process sets the mode of a new file, SQLite does not wait: it says so at once.
            busy = getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not busy or time.monotonic() > end:
                _close(db)
                raise refused(error, file) from error
            if db is not None and db.in_transaction:
                db.execute("rollback")
            time.sleep(0.02)
        except ValueError:
            _close(db)
            raise


def reading(file):
    """The file as it is, to read only: an old one, or one on a medium that takes no writing, is left alone.

    Raises FileNotFoundError if there is none, else ValueError as `connect`.
    """
    path = Path(file).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no {file}; name the file that runs or experiments were kept in")
    address = path.resolve().as_uri()
    # A folder that takes no writing has no room for the file of locks that WAL wants beside it.
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        db = sqlite3.connect(f"{address}?{mode}", PATIENCE, uri=True, isolation_level=None)
        try:
            if not _version(db, file):
                raise ValueError(f"{file} is empty; name the file that runs or experiments were kept in")
            return db
        except sqlite3.Error as error:
            db.close()
            code = getattr(error, "sqlite_errorcode", None)
            if code not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) or "immutable" in mode:
                raise refused(error, file) from error
        except ValueError:
            db.close()
            raise


def _close(db):
    if db is not None:
        db.close()


def refused(error, file):
    """What to raise for an error of SQLite's while a file is opened."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without SQLite's finer distinctions
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return OSError(
            f"nothing can be written into {file} ({error}); make room on the disk, or name another file"
        )
    return ValueError(
        f"{file} cannot hold experiments and runs ({error}); give file= a new name, or one made by moddiff"
    )


def _version(db, file):
    """The version of a file's schema: 0 of an empty one, 1 of an old one.

    Raises ValueError for one that is not ours to write into.
    """
    # One look: between two, another process may have made what the first did not find.
    db.execute("begin")
    try:
        owner = db.execute("pragma application_id").fetchone()[0]
        version = db.execute("pragma user_version").fetchone()[0]
        tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
    finally:
        db.execute("rollback")
    if owner == OURS and version > VERSION:
        raise ValueError(
            f"{file} was made by a newer moddiff: its schema is {version}, and this one knows up to "
            f"{VERSION}. Update moddiff, or name another file"
        )
    if owner == OURS:
        return version
    if owner or version or not tables <= OLD:
        raise ValueError(
            f"{file} is a database of another program (its tables: {', '.join(sorted(tables)) or 'none'}); "
            "give file= a new name, or one made by moddiff"
        )
    return 1 if tables else 0


def try_out(file):
    """Make the file where there is none, and raise OSError, now and not after the work, where none can be."""
    writable(file)
    with closing(connect(file)) as db:
        try:
            with transaction(db):
                db.execute("insert into data values ('trial', 0, zeroblob(65536))")
                db.execute("delete from data where digest = 'trial'")
        except sqlite3.Error as error:
            raise refused(error, file) from error


@contextmanager
def transaction(db):
    """All that is written in this block, or nothing; other processes wait."""
    db.execute("begin immediate")
    try:
        yield db
        db.execute("commit")
    finally:
        if db.in_transaction:
            db.execute("rollback")


# ---- arrays ---------------------------------------------------------------------------------------------


def packed(array):
    """An array as bytes, without loss.

    Deflate at its fastest: the lossless codecs for videos save a tenth more of a film with some noise in it,
    and would be one more way in which a file can be unreadable.
    """
    # safetensors writes the memory of an array as it lies there, whatever its strides say.
    return zlib.compress(save({"array": np.ascontiguousarray(array)}), 1)


def unpacked(data):
    return load(zlib.decompress(data))["array"]


def put(db, digest, array):
    """Keep an array under its digest: what is there already is not written again."""
    if db.execute("select 1 from data where digest = ?", (digest,)).fetchone() is None:
        data = array if isinstance(array, bytes) else packed(array)
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
        rows = [(digest, i, piece) for i, piece in enumerate(pieces)]
        db.executemany("insert into data values (?, ?, ?)", rows)


def got(file, digest):
    """The array that is kept under a digest.   Raises ValueError where it is damaged."""
    with closing(reading(file)) as db:
        rows = db.execute("select bytes from data where digest = ? order by piece", (digest,)).fetchall()
    try:
        return unpacked(b"".join(piece for (piece,) in rows))
    except zlib.error as error:
        raise ValueError(f"{os.fspath(file)} is damaged: what it holds as {digest} cannot be read") from error
