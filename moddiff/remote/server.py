"""How do others ask my components?  A server of HTTP: one path for each role, and a worker behind each.

    GET  /health       what runs here, and whether it is ending; no token
    GET  /v1/<role>    what a component is: fingerprint, facts, taps
    POST /v1/<role>    a question (wire.py)

What goes wrong is said as JSON, {"error": kind, "message": sentence}, under one of these numbers:

    400 no message   401 no token   404 no such role   408 slow   409 another model or version
    411, 413 size not told, too large   422 the component refuses the inputs
    429, 503 busy or ending, with Retry-After   500 the component failed   504 the deadline passed
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import socket
import threading
import time
from contextlib import contextmanager

from ..hooks import bytes_of, in_words
from .client import REFUSALS
from .served import Served
from .wire import VERSION, Malformed, number, unpacked
from .work import CancelledError, Full, Late, Worker

log = logging.getLogger("moddiff.remote")
LOOPBACK = "127.0.0.1"
BODY_WITHIN = 60.0  # seconds for a body to arrive
LATEST = 24 * 3600.0  # no one waits longer than this


class Refused(Exception):
    """An answer that is none.   status, kind, message; after: seconds for Retry-After"""

    def __init__(self, status, kind, message, after=None):
        super().__init__(message)
        self.status, self.kind, self.after = status, kind, after


class Service:
    """Components, and who may ask them.

    parts   {role: component};  token: what each question must bring, or None
    limit   bytes of a question, such as "1 GB";  places: how many questions wait for each component
    """

    def __init__(self, parts, token=None, limit="1 GB", places=8):
        if not parts:
            raise ValueError("there is nothing to serve; give at least one role")
        self.served = {role: Served(role, part) for role, part in parts.items()}
        self.workers = {role: Worker(role, places) for role in parts}
        self.token, self.limit = token, bytes_of(limit)
        self.stopping = False

    def stop(self):
        """What runs is finished, what waits and what comes is refused."""
        self.stopping = True
        for worker in self.workers.values():
            worker.stop()

    def health(self):
        roles = {role: {"fingerprint": served.fingerprint} for role, served in self.served.items()}
        return {"status": "ending" if self.stopping else "ok", "version": VERSION, "roles": roles}

    def admit(self, role, headers):
        """Who asks what?   -> Served.  Raises Refused."""
        given = headers.get("authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        if self.token is not None and not hmac.compare_digest(given, self.token.encode()):
            raise Refused(401, "token", "the token is missing or wrong; give token= that of the server")
        if role not in self.served:
            raise Refused(
                404, "role", f"nothing plays the role {role!r} here; there is {', '.join(self.served)}"
            )
        return self.served[role]

    async def answer(self, role, request):
        """The answer to one question.   -> pieces of a message, their bytes in all.  Raises Refused."""
        served, worker = self.admit(role, request.headers), self.workers[role]
        size = self._size(request.headers)
        with _place(worker):
            try:
                async with asyncio.timeout(BODY_WITHIN):
                    body = await _body(request, size)
                header, tensors = await _apart(unpacked, body)
                left = number(header.get("deadline"), "deadline", 0.0, LATEST)
            except TimeoutError:
                raise Refused(408, "slow", f"the body did not arrive within {BODY_WITHIN:g} s") from None
            except Malformed as error:
                raise Refused(400, "malformed", str(error)) from None
            if complaint := served.complaint(header):
                raise Refused(409, "misfit", complaint)
            until = time.monotonic() + left
            try:
                future = worker.submit(lambda: served.answer(header, tensors), until)
            except Full as full:
                raise _busy(full, 503) from None
            return await _finished(future, request, left)

    def _size(self, headers):
        told = headers.get("content-length", "")
        if not told.isdecimal():
            raise Refused(411, "size", "the size of the body is not told; send Content-Length")
        if int(told) > self.limit:
            raise Refused(
                413,
                "size",
                f"the body has {in_words(int(told))}, and {in_words(self.limit)} is the most here; ask for "
                "less, or start the server with a larger --limit",
            )
        return int(told)


@contextmanager
def _place(worker):
    try:
        worker.take_place()
    except Full as full:
        raise _busy(full, 503 if worker.stopping else 429) from None
    try:
        yield
    finally:
        worker.leave()


def _busy(full, status):
    return Refused(status, "busy", str(full), full.after)


async def _body(request, size):
    body = b"".join([chunk async for chunk in request.stream()])
    if len(body) != size:
        raise Malformed(f"{len(body)} bytes arrived, and {size} were told")
    return body


async def _apart(function, data):
    """function(data), beside the loop where it would hold the others up."""
    return function(data) if len(data) < 2**24 else await asyncio.to_thread(function, data)


async def _finished(future, request, left):
    """What the worker made.  Nobody waits for it after the deadline, or when the asking end has gone."""
    result = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({result, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            result.cancel()  # what waits is dropped; what runs ends for nobody
            raise Refused(504, "late", "the deadline passed, or the asking end has gone")
        if result.cancelled():
            raise Refused(503, "cancelled", "it was dropped", 1.0)
        if (error := result.exception()) is not None:
            raise _refusal(error)
        return result.result()
    finally:
        gone.cancel()
        if result.done() and not result.cancelled():
            result.exception()  # looked at, so that nobody is told that it was not


async def _gone(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error):
    """What a failure is called on the wire."""
    if isinstance(error, Malformed):
        return Refused(400, "malformed", str(error))
    if isinstance(error, Full):
        return _busy(error, 503)
    if isinstance(error, Late):
        return Refused(504, "late", str(error))
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in REFUSALS]
    if kinds and kinds[0] != "ContractError":  # that one is about our own answer
        return Refused(422, kinds[0], str(error.args[0]) if error.args else str(error))
    log.error("the component failed", exc_info=error)
    return Refused(500, type(error).__name__, f"the component failed: {type(error).__name__}: {error}"[:1000])


# ---- HTTP ------------------------------------------------------------------------------------------------


def application(service):
    """A FastAPI application of a service."""
    try:
        from fastapi import FastAPI, Response
        from starlette.routing import Route
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a server needs FastAPI; run: pip install 'moddiff[serve]'") from error

    def said(status, content, headers=None):
        return Response(json.dumps(content), status, headers, "application/json")

    async def refused(request, error):
        headers = None if error.after is None else {"Retry-After": f"{error.after:.2f}"}
        return said(error.status, {"error": error.kind, "message": str(error)}, headers)

    app = FastAPI(openapi_url=None, exception_handlers={Refused: refused})

    @app.get("/health")
    async def health():
        return said(503 if service.stopping else 200, service.health())

    async def describe(request):
        role = request.path_params["role"]
        return said(200, service.admit(role, request.headers).described())

    async def ask(request):
        pieces, _ = await service.answer(request.path_params["role"], request)
        return Response(b"".join(pieces), media_type="application/octet-stream")

    # Plain routes: what FastAPI does to find the arguments of a function would cost a third of a small call.
    app.router.routes += [
        Route("/v1/{role}", describe, methods=["GET"]),
        Route("/v1/{role}", ask, methods=["POST"]),
    ]
    return app


def check_host(host, token):
    """Raise ValueError for a server that strangers could ask."""
    try:
        inside = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = False
    if not inside and not token:
        raise ValueError(
            f"at {host} others can reach this server; give it a token (--token-file FILE), or leave "
            f"it at {LOOPBACK}"
        )


def listening(host, port):
    """A socket at that address; port 0: any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol: only where that says TCP does asyncio send small pieces at once (NODELAY). Else the
    # end of an answer waits for the other side's ACK, 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen()  # who asks from now on, before the server is up, waits and is not refused
    except OSError as error:
        sock.close()
        raise OSError(f"cannot serve at {host}:{port} ({error}); choose another --port") from error
    return sock


def http_server(service):
    """A uvicorn server that ends as `Service.stop` says, by a signal or by `should_exit`."""
    import uvicorn

    class Ending(uvicorn.Server):
        def handle_exit(self, sig, frame):
            service.stop()
            super().handle_exit(sig, frame)

    app, quiet = application(service), {"log_level": "warning", "access_log": False}
    # No line in an answer that nobody reads: the other end takes each apart.
    bare = {"server_header": False, "date_header": False, "lifespan": "off"}
    return Ending(uvicorn.Config(app, timeout_keep_alive=600, **quiet, **bare))


@contextmanager
def serving(parts, host=LOOPBACK, port=0, token=None, **how):
    """A server in a thread of this process: `with serving({"text": pipe.text}) as url:`.

    parts  {role: component};  port 0: any that is free;  how: limit, places, as Service takes them
    """
    check_host(host, token)
    service = Service(parts, token, **how)
    server, sock = http_server(service), listening(host, port)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [sock]}, name="moddiff-serve", daemon=True
    )
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"http://{host}:{sock.getsockname()[1]}"
    finally:
        service.stop()
        server.should_exit = True
        thread.join()
        sock.close()


__all__ = ["CancelledError", "Service", "application", "check_host", "http_server", "listening", "serving"]
