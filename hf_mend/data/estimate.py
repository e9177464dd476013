"""How long something will take, said once when its first items are done."""

from __future__ import annotations

import time
from collections.abc import Callable

from transformers.utils import logging


logger = logging.get_logger(__name__)

# What takes no longer is not worth a message; seconds.
_SHORT = 60.0
# So many items are timed before anything is said, or fewer that took so many seconds.
_ITEMS, _SECONDS = 2, 10.0


class Estimate:
    """
    Says once how long something takes, when its first items show that it is more than a minute.

    Args:
        what (`str`): What is done, for the message.
        total (`int`): The number of items.
        noun (`str`): What they are called.
        say (`Callable`, *optional*): Takes the message; a warning of the log by default.
        clock (`Callable`, *optional*): Gives the time in seconds.
        work (`float`, *optional*): The work in all items, in any unit, where some take longer than others.
    """

    def __init__(
        self,
        what: str,
        total: int,
        noun: str,
        say: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        work: float | None = None,
    ):
        self.what, self.total, self.noun, self.clock = what, total, noun, clock
        self.say = logger.warning if say is None else say
        self.work = total if work is None else work
        self.began, self.count, self.worked, self.said = clock(), 0, 0.0, False

    def done(self, count: int = 1, work: float | None = None) -> None:
        """Note that so many more items are done, and how much work that was."""
        self.count += count
        self.worked += count if work is None else work
        elapsed = self.clock() - self.began
        if self.said or not self.count or (self.count < _ITEMS and elapsed < _SECONDS):
            return
        whole = elapsed / self.worked * self.work
        if whole > _SHORT and self.count < self.total:
            self.said = True
            self.say(
                f"{self.what}: {self.total} {self.noun} will take about {duration(whole)} "
                f"(the first {self.count} took {duration(elapsed)})"
            )


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"
