"""Whose turn is it?  One worker a component: what comes next waits in a short line, or is refused."""

import threading
import time
from collections import deque
from concurrent.futures import CancelledError, Future


class Full(RuntimeError):
    """The line is full, or the worker is ending; `after`: seconds after which there may be room."""

    def __init__(self, message, after):
        super().__init__(message)
        self.after = after


class Late(RuntimeError):
    """The one who asked has stopped waiting."""


class Worker:
    """A thread that does one thing after another.

    places  how many may wait; a place is taken before the work has arrived, so that what arrives fits in
    """

    def __init__(self, name, places=8):
        self.places, self.taken, self.stopping = places, 0, False
        self.line, self.changed = deque(), threading.Condition()
        self.usual = 1.0  # seconds of one piece of work, lately
        self.thread = threading.Thread(target=self._work, name=f"moddiff-{name}", daemon=True)
        self.thread.start()

    def take_place(self):
        """Raises Full.  Each place is given back by `leave`."""
        with self.changed:
            if self.stopping:
                raise Full("the server is ending", 5.0)
            if self.taken > self.places:  # those who wait, and the one whose turn it is
                raise Full(
                    f"{self.places} questions are waiting already", max(self.usual * self.taken / 2, 0.1)
                )
            self.taken += 1

    def leave(self):
        with self.changed:
            self.taken -= 1

    def submit(self, function, until):
        """function() in its turn.   -> a Future, which may be cancelled as long as it waits

        until  time.monotonic() after which nobody waits for it
        """
        future = Future()
        with self.changed:
            if self.stopping:
                raise Full("the server is ending", 5.0)
            self.line.append((future, function, until))
            self.changed.notify()
        return future

    def stop(self):
        """End after what is being done; what waits is refused."""
        with self.changed:
            self.stopping = True
            for future, _, _ in self.line:
                if future.set_running_or_notify_cancel():
                    future.set_exception(Full("the server is ending", 5.0))
            self.line.clear()
            self.changed.notify()

    def _work(self):
        while True:
            with self.changed:
                while not self.line and not self.stopping:
                    self.changed.wait()
                if self.stopping:
                    return
                future, function, until = self.line.popleft()
                begun = future.set_running_or_notify_cancel()
            if not begun:
                continue
            if (started := time.monotonic()) > until:
                future.set_exception(Late("its turn came after the deadline"))
                continue
            try:
                result = function()
            except BaseException as error:  # handed on to the one who asked, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)
                self.usual = 0.8 * self.usual + 0.2 * (time.monotonic() - started)
            del future, function


__all__ = ["CancelledError", "Full", "Late", "Worker"]
