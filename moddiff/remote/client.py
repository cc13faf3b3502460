"""How is a question asked, and when is it given up?  One end of a connection, which says what went wrong.

All of a question, with connecting, waiting and each byte of the answer, has the seconds of `timeout` and no
more. A question is asked again in two cases only, in which no work is lost: the connection had been closed
since the last one, or the server said that it is busy, and when to come again.
"""

import io
import json
import socket
import time
from collections import deque
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

from ..contracts import ContractError
from ..hooks import NeverFired, OverLimit, UnknownTap
from ..telemetry import traceparent
from .wire import VERSION, Malformed, RemoteError, brief, misfit, packed, unpacked

# What a component elsewhere may raise about its inputs, and is raised here as it would be by one of our own.
REFUSALS = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, LookupError, IndexError, KeyError, NeverFired, UnknownTap)
} | {"OverLimit": OverLimit, "ContractError": ContractError}
LARGEST = 2**34  # bytes of an answer
SMALL = 2**20  # bytes of a question that is put together before it goes
ADVICE = "is the address right, and does `moddiff serve` run there?"


class Busy(RemoteError):
    """The server has too much to do, or is ending; `after`: the seconds after which it may be asked again."""

    after = 1.0


class Server:
    """A server, as one component of it is asked.

    url, role   where, and for which role;  token: the server's password, if it has one
    timeout     seconds for each question, all in all
    """

    def __init__(self, url, role, token=None, timeout=60.0):
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server; expected one like http://127.0.0.1:8000")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout!r}; expected seconds, above 0")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.url, self.role, self.timeout = f"{parts.scheme}://{parts.netloc}", role, timeout
        self.host, self.port = parts.hostname, parts.port or kind.default_port
        self.kind, self.path = kind, f"{parts.path.rstrip('/')}/v1/{role}"
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.idle = deque(maxlen=8)  # connections, each for one thread at a time

    def __deepcopy__(self, memo):
        return self  # a copy of a component asks the same server

    def __repr__(self):
        return f"{self.url} ({self.role})"

    def describe(self):
        """What the server says of the component: fingerprint, facts, taps.   -> dict"""
        data = self._asked("GET", [], 0)
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise self._failed(f"it described itself as {brief(bytes(data[:60]))}; is it a `moddiff serve`?")
        return told

    def ask(self, fingerprint, op, tensors, **told):
        """One message there and one back.   -> (header, {name: tensor})

        Raises RemoteError; or what the component raised about its inputs.
        """
        until = time.monotonic() + self.timeout
        while True:
            left = until - time.monotonic()
            header = {"version": VERSION, "role": self.role, "fingerprint": fingerprint, "op": op}
            header |= {"deadline": max(left, 0.001), "traceparent": traceparent()} | told
            try:
                data = self._asked("POST", *packed(header, tensors), until)
                break
            except Busy as busy:
                if time.monotonic() + busy.after >= until:
                    raise
                time.sleep(busy.after)
        try:
            answer, tensors = unpacked(data)
        except Malformed as error:
            raise self._failed(f"the answer is {error}; was something between the two changing it?") from None
        if complaint := misfit(answer, self.role, fingerprint):
            raise self._failed(f"the answer does not fit: {complaint}")
        return answer, tensors

    # ---- one exchange -----------------------------------------------------------------------------------

    def _asked(self, method, pieces, size, until=None):
        """The bytes of the answer, within the time."""
        until = time.monotonic() + self.timeout if until is None else until
        connection = self.idle.pop() if self.idle else None
        if connection is not None:
            try:
                return self._exchange(connection, method, pieces, size, until)
            except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
                pass  # it was closed since the last question: nobody has read this one
        connection = self._connected(until)
        try:
            return self._exchange(connection, method, pieces, size, until)
        except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
            raise self._failed(
                "the connection was closed before an answer came; did the server end? A run goes on from its "
                "last step with moddiff.resume(pipe, state)"
            ) from None

    def _connected(self, until):
        connection = self.kind(self.host, self.port, timeout=max(until - time.monotonic(), 0.001))
        try:
            connection.connect()
        except TimeoutError:
            raise self._failed(f"nothing answered within {self.timeout:g} s; {ADVICE}") from None
        except OSError as error:
            raise self._failed(f"cannot connect ({error}); {ADVICE}") from None
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sock = _Timed(connection.sock)
        return connection

    def _exchange(self, connection, method, pieces, size, until):
        """Send, and read the answer; the connection is kept only where all of it went well."""
        connection.sock.until = until
        try:
            connection.putrequest(method, self.path, skip_accept_encoding=True)
            for name, value in (self.headers | {"Content-Length": str(size)}).items():
                connection.putheader(name, value)
            connection.endheaders()
            refused = None
            try:
                connection.sock.send_all(pieces)
            except (BrokenPipeError, ConnectionResetError) as error:
                refused = error  # a server may say no before it has read all, and then its answer is there
            response = connection.getresponse()
            length = response.length
            if length is None or length > LARGEST:
                raise HTTPException(f"it says that its length is {length}")
            data = response.read()
            if len(data) < length:
                raise HTTPException(f"{len(data)} of {length} bytes came")
            if refused is None and not response.will_close:
                self.idle.append(connection)
                connection = None
        except TimeoutError:
            raise self._failed(
                f"no answer within {self.timeout:g} s; is it overloaded? give timeout= more seconds, or ask "
                "for less"
            ) from None
        except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
            raise
        except (HTTPException, OSError, ValueError) as error:
            raise self._failed(f"the answer broke off or is none of HTTP ({_words(error)})") from None
        finally:
            if connection is not None:
                connection.close()
        if response.status != 200:
            self._raise(response, data)
        return data

    def _raise(self, response, data):
        try:
            told = json.loads(data)
            kind, message = str(told["error"]), str(told["message"])[:2000]
        except (ValueError, KeyError, TypeError, RecursionError):
            kind, message = "", brief(bytes(data[:200]))
        if response.status == 422 and kind in REFUSALS:
            raise REFUSALS[kind](f"{message} (said by {self})")
        if response.status in (429, 503):
            busy = Busy(self._failed(message).args[0], response.status)
            after = response.getheader("Retry-After", "1")
            busy.after = min(max(float(after), 0.05), 60.0) if after.replace(".", "", 1).isdecimal() else 1.0
            raise busy
        raise self._failed(message, response.status)

    def _failed(self, message, status=None):
        return RemoteError(f"{self}: {message}", status)


def _words(error):
    return f"{type(error).__name__}: {str(error)[:200]}"


class _Timed:
    """A socket that ends at a moment, however slowly its bytes come.   until: time.monotonic()

    What http.client sends, the head of a question, waits for the body: a small question then goes in one
    piece, and wakes the other end once.
    """

    def __init__(self, sock):
        self.sock, self.until, self.head = sock, 0.0, b""

    def _left(self):
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        return self.sock

    def sendall(self, data):
        self.head += data

    def send_all(self, pieces):
        pieces, self.head = [self.head, *pieces], b""
        small = sum(map(len, pieces)) < SMALL
        for piece in [b"".join(pieces)] if small else pieces:
            self._left().sendall(piece)

    def makefile(self, mode):
        return io.BufferedReader(_Reader(self), 2**16)

    def close(self):
        self.sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, timed):
        self.timed = timed

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.timed._left().recv_into(buffer)
