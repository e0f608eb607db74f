"""Stops a run before its end, after a signal or a time limit: it saves a checkpoint, then exits.

Processes of one run receive a signal at different moments, so they agree: the reason is exchanged with the count of
pairs of every step, and all of them stop after the same step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor
from transformers import TrainerState

from tdpo.errors import Stopped

OUT_OF_TIME = 124
"""Exit code once ``--max_time`` is over: that of ``timeout``, since no signal number goes with it."""
SIGNALS = {128 + signal.SIGINT: signal.SIGINT, 128 + signal.SIGTERM: signal.SIGTERM}
FORWARDING_SECONDS = 5.0
"""Under a launcher, a second signal within this time is the first one, which the launcher forwarded."""


class StopRequest:
    """Records why this process has to stop, as the exit code to stop with.

    Args:
        max_time: Seconds a run may take from :meth:`start` on, None for no limit.

    Attributes:
        agreed: The largest code of all processes at the last step, which all of them follow.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self.code = 0
        self.agreed: Tensor | int = 0
        self.max_time = max_time
        self._deadline: float | None = None
        self._first = 0.0

    def start(self) -> None:
        """Starts the clock, unless it is running."""
        self.agreed = 0
        if self._deadline is None and self.max_time is not None:
            self._deadline = time.monotonic() + self.max_time

    def poll(self) -> int:
        """Returns 0, or the exit code of the reason to stop."""
        if not self.code and self._deadline is not None and time.monotonic() >= self._deadline:
            self.code = OUT_OF_TIME
        return self.code

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: the first asks to stop, the second exits at once and loses what is not in a checkpoint."""
        code = 128 + number
        if self.code in SIGNALS:
            # Launchers forward a terminal's Ctrl-C to processes that have received it already.
            if "LOCAL_RANK" in os.environ and time.monotonic() - self._first < FORWARDING_SECONDS:
                return
            os.write(2, b"\ntdpo: exiting at once\n")
            os._exit(code)
        self.code, self._first = code, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            os.write(2, f"\ntdpo: {name}: saving after this step; a second one exits at once\n".encode())

    def stop_code(self, state: TrainerState) -> int:
        """Returns the exit code that all processes agreed on; 0 if there is none, or the run is at its end."""
        return int(self.agreed) if state.global_step < state.max_steps else 0

    def raise_if_stopped(self, state: TrainerState) -> None:
        """Raises if training returned before its end.

        Raises:
            Stopped: saying why, and from where the run can continue.
        """
        code, step = self.stop_code(state), state.global_step
        if code:
            reason = f"interrupted by {SIGNALS[code].name}" if code in SIGNALS else "out of time (--max_time)"
            raise Stopped(
                f"{reason} at step {step} of {state.max_steps}: saved checkpoint-{step}; the same command with "
                "--resume continues from it",
                code,
            )


@contextmanager
def handle_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Passes SIGINT and SIGTERM to ``handle`` inside the block; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS.values()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        sys.stderr.flush()
