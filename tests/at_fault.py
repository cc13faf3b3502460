"""Servers in processes of their own, which tests may kill, and a wire that breaks after so many bytes.

One process imports everything and forks a server for each line that it is told: killing one costs nothing.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from small import pipeline

from moddiff.remote.server import Service, http_server, listening


class Slow(torch.nn.Module):
    """A text encoder that takes a second more; its tokens tell how often it encoded."""

    def __init__(self, inner):
        super().__init__()
        self.wraps, self.calls = inner, 0

    def encode(self, prompts):
        self.calls += 1
        time.sleep(1)
        return self.wraps.encode(prompts)

    def tokens(self, prompt):
        return [(self.calls, "calls")]


def serve(pipe, slow, token):
    """Serve the parts of a pipeline, and print where."""
    parts = {role: pipe.components[role] for role in ("text", "dit", "vae")}
    if slow == "slow":
        parts["text"] = Slow(parts["text"])
    sock = listening("127.0.0.1", 0)
    service = Service(parts, None if token == "-" else token, limit="8 MB")
    print(json.dumps([os.getpid(), sock.getsockname()[1]]), flush=True)
    http_server(service).run(sockets=[sock])


def main(folder):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who has ended is forgotten
    torch.set_num_threads(1)  # a fork has no other threads
    pipe = pipeline(Path(folder))
    for line in sys.stdin:
        if os.fork() == 0:
            serve(pipe, *line.split())
            os._exit(0)


class Forks:
    """The process that forks servers."""

    def __init__(self, folder):
        command = [sys.executable, __file__, str(folder)]
        here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
        )
        self.pids = []

    def begin(self, slow="quick", token="-"):
        """-> pid, url of a new server"""
        print(slow, token, file=self.process.stdin, flush=True)
        pid, port = json.loads(self.process.stdout.readline())
        self.pids.append(pid)
        return pid, f"http://127.0.0.1:{port}"

    def close(self):
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with self.process as process:
            process.stdin.close()


def held(pid):
    """What a process has open.   -> files, threads, its largest memory in bytes so far"""
    status = Path(f"/proc/{pid}/status").read_text()
    largest = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return (
        len(os.listdir(f"/proc/{pid}/fd")),
        len(os.listdir(f"/proc/{pid}/task")),
        1024 * int(largest.split()[1]),
    )


class Wire:
    """What lies between a client and a server: after `left` bytes, either way, `broken()` is called.

    port      of the server;  left: None: no end;  passed: bytes so far
    """

    def __init__(self, port):
        self.port, self.left, self.passed, self.broken = port, None, 0, None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.selector, self.stopping = selectors.DefaultSelector(), False
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self._relay)
        self.thread.start()

    def _relay(self):
        while not self.stopping:
            for key, _ in self.selector.select(0.05):
                if key.fileobj is self.listener:
                    self._joined()
                elif key.fileobj.fileno() >= 0:  # not closed by the one before it
                    self._pass(key.fileobj, key.data)
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()

    def _joined(self):
        client, _ = self.listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self.port))
        except ConnectionRefusedError:
            client.close()
            return
        for one, other in ((client, server), (server, client)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(one, selectors.EVENT_READ, other)

    def _pass(self, one, other):
        data = b""
        with suppress(ConnectionError):
            data = one.recv(2**16 if self.left is None else min(2**16, max(self.left, 1)))
            other.sendall(data)
        self.passed += len(data)
        ends = not data
        if self.left is not None:
            self.left -= len(data)
            if self.left <= 0:
                self.left, ends = None, True
                self.broken()
        if ends:
            for end in (one, other):
                self.selector.unregister(end)
                end.close()

    def close(self):
        self.stopping = True
        self.thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
