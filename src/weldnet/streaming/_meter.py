"""How far a long step is, and how long it will still take: on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import final

__all__ = ["Meter"]

#: Seconds between two lines: on a terminal one line is written over and over, in a log there is one after another.
_TERMINAL, _LOG = 0.5, 30.0


@final
class Meter:
    """Counts bytes of weights that were read, and the seconds of every step.

    Args:
        shown: whether to say anything.
    """

    def __init__(self, shown: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self._shown = shown
        self._what, self._step = "", ""
        self._size, self._done = 0, 0
        self._start = self._step_start = self._last = time.monotonic()
        self._width = 0

    def step(self, name: str) -> None:
        """Begin a step; the seconds since the last one began are its own."""
        self._account()
        self._step = name
        self._begin("", 0, force=True)

    def begin(self, what: str, size: int) -> None:
        """Begin a part of the step that reads ``size`` bytes; in a log it says so only if a line is due."""
        self._begin(what, size, force=sys.stderr.isatty())

    def read(self, size: int) -> None:
        """Count bytes that were read."""
        self._done += size
        self._line()

    def say(self, text: str) -> None:
        """Say something that stays on a line of its own; between steps only."""
        if self._shown:
            self._print(f"weldnet: {text}\n")

    def close(self) -> None:
        """End the last step, and leave the terminal on a fresh line."""
        self._account()
        self._step = ""
        if self._shown and self._width:
            self._print("\n")
            self._width = 0

    def _begin(self, what: str, size: int, *, force: bool) -> None:
        self._what, self._size, self._done = what, size, 0
        self._start = time.monotonic()
        self._line(force=force)

    def _account(self) -> None:
        now = time.monotonic()
        if self._step:
            self.seconds[self._step] = round(self.seconds.get(self._step, 0.0) + now - self._step_start, 4)
        self._step_start = now

    def _line(self, *, force: bool = False) -> None:
        terminal, now = sys.stderr.isatty(), time.monotonic()
        due = now - self._last >= (_TERMINAL if terminal else _LOG)
        if not self._shown or not self._step or not (due or force):
            return
        self._last = now
        text = f"weldnet: {self._step}{': ' * bool(self._what)}{self._what}{self._progress(now)}"
        if terminal:
            self._print("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._print(text + "\n")

    def _progress(self, now: float) -> str:
        if not self._size or not self._done:
            return ""
        share = min(1.0, self._done / self._size)
        left = (now - self._start) * (1 - share) / share
        return f", {share:.0%} of {self._size / 1e9:.3g} GB read, {_clock(left)} left"

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _clock(seconds: float) -> str:
    """Write seconds as a clock.

    >>> _clock(75), _clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
