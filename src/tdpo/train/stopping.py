"""Reasons to stop before the end: a signal, or the time a run was given. The run saves a checkpoint, then leaves.

Processes of one run are told at different moments, so they agree: the reason travels with the count of pairs that every
step exchanges anyway, and all of them stop after the same step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

OUT_OF_TIME = 124
"""Exit code once ``--max_time`` is over: that of ``timeout``, since no signal number goes with it."""
SIGNALS = {128 + signal.SIGINT: signal.SIGINT, 128 + signal.SIGTERM: signal.SIGTERM}
LAUNCHERS_ECHO = 5.0
"""Seconds in which a second signal under a launcher is the first one, handed on by it."""


class StopRequest:
    """Whether this process has been asked to stop, as the exit code to stop with.

    Args:
        max_time: Seconds a run may take from :meth:`start` on, None for no limit.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self.code = 0
        self.max_time = max_time
        self._deadline: float | None = None
        self._first = 0.0

    def start(self) -> None:
        """Starts the clock, unless it is running."""
        if self._deadline is None and self.max_time is not None:
            self._deadline = time.monotonic() + self.max_time

    def poll(self) -> int:
        """0, or the exit code of the reason to stop."""
        if not self.code and self._deadline is not None and time.monotonic() >= self._deadline:
            self.code = OUT_OF_TIME
        return self.code

    def handle(self, number: int, frame: FrameType | None) -> None:
        """A signal arrived. The first asks; the second leaves at once, which costs what is not in a checkpoint."""
        code = 128 + number
        if self.code in SIGNALS:
            # Launchers hand a terminal's Ctrl-C on to processes that have had it already.
            if "LOCAL_RANK" in os.environ and time.monotonic() - self._first < LAUNCHERS_ECHO:
                return
            os.write(2, b"\ntdpo: leaving at once\n")
            os._exit(code)
        self.code, self._first = code, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            os.write(2, f"\ntdpo: {name}: saving after this step; a second one leaves at once\n".encode())


@contextmanager
def listening(request: StopRequest) -> Iterator[StopRequest]:
    """Hands SIGINT and SIGTERM to ``request`` inside; only a main thread may ask for signals, others go without."""
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in SIGNALS.values()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        sys.stderr.flush()


def reason(code: int) -> str:
    """Why a run stopped, in words.

    Example:
        >>> reason(143), reason(124)
        ('interrupted by SIGTERM', 'out of time (--max_time)')
    """
    return f"interrupted by {SIGNALS[code].name}" if code in SIGNALS else "out of time (--max_time)"
