"""Ctrl-C and SIGTERM: the step in progress is finished and saved, then the command leaves."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A run was asked to stop, did so and can be resumed; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + received


class StopRequest:
    """The signal that asked to stop, if any."""

    received: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While the block runs, a first SIGINT or SIGTERM is only noted; a second one ends the process at once.

    The earlier handlers are put back afterwards. Outside the main thread, where Python delivers no signal, nothing is
    caught.
    """
    from tqdm import tqdm  # here: `gdro presets` does without

    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.received = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        text = f"{signal.Signals(number).name}: stopping when this step is done and saved; again: at once"
        tqdm.write(text, file=sys.stderr)

    before: dict[signal.Signals, Any] = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
