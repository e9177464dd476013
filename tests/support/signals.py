"""Real signals, at random moments of a call."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from .interrupts import Checked


def interrupted_by_signal(call: Callable[[], object], delay: float) -> bool:
    """Run a call, send SIGINT to this process after so many seconds, and return whether it found the call running."""
    armed, met = [True], []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if armed[0]:
            armed[0] = False
            met.append(True)
            raise KeyboardInterrupt

    def send() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, on_signal)
    thread = threading.Thread(target=send)
    try:
        thread.start()
        call()
        armed[0] = False
    except KeyboardInterrupt:
        pass
    finally:
        armed[0] = False
        thread.join()
        time.sleep(0)  # the handler runs in this thread
        signal.signal(signal.SIGINT, before)
    return bool(met)


def attack(model: Checked, rng: random.Random, count: int) -> tuple[int, list[str]]:
    """Interrupt a call so often, and return how many signals met it and what was wrong."""
    model.set_up()
    start = time.perf_counter()
    model.run()
    seconds = time.perf_counter() - start
    model.faults()
    met, wrong = 0, []
    for _ in range(count):
        model.set_up()
        delay = seconds * rng.random()
        met += interrupted_by_signal(model.run, delay)
        wrong += [f"after {delay:.4f} of {seconds:.4f} s: {fault}" for fault in model.faults()]
    return met, wrong
