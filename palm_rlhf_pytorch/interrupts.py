"""Ctrl-C that lets the step under way end, so that what is saved then can be gone on from exactly."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """While entered, Ctrl-C only sets `asked`; a second one interrupts at once. Outside the main thread, nothing."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self.catching = threading.current_thread() is threading.main_thread()
        if self.catching:
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.catching:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # not print: it may be what was interrupted
        os.write(2, b"\nstopping when this step is done and saved; Ctrl-C again stops at once\n")
