"""
Files as an attacker or a broken disk may leave them: each is a clear error or a correct load, never a crash, a hang, a
changed model, or memory that the file itself does not have.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.altered_files import Material, make_material, run_case


SECONDS_A_CASE = 20  # on a machine that does other things too; most take some milliseconds
MEGABYTES = 400


@pytest.fixture(scope="module")
def material(tmp_path_factory, tokenizer):
    return make_material(tmp_path_factory.mktemp("good"), tokenizer)


@contextlib.contextmanager
def time_limit(seconds: int):
    def late(*args: Any) -> None:
        raise AssertionError(f"took longer than {seconds} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def peak(reset: bool = False) -> int:
    """The most memory that this process has had, in megabytes, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024


def run_cases(numbers: range, material: Material) -> Counter[str]:
    start = peak(reset=True)
    outcomes: Counter[str] = Counter()
    try:
        for number in numbers:
            if number % 100 == 0:  # for code that lets no signal through
                faulthandler.dump_traceback_later(100 * SECONDS_A_CASE, exit=True)
            with time_limit(SECONDS_A_CASE):
                outcomes[run_case(number, material)] += 1
            assert peak() - start < MEGABYTES, f"case {number} took {peak() - start} MB"
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert outcomes.keys() <= {"refused", "loaded"}
    return outcomes


def test_some_damaged_files(material):
    outcomes = run_cases(range(200), material)
    assert outcomes["refused"] > 100 and outcomes["loaded"] > 5, "both happen"


@pytest.mark.slow
def test_two_thousand_damaged_files(material):
    outcomes = run_cases(range(2000), material)
    assert sum(outcomes.values()) == 2000
    assert outcomes["refused"] > 1000 and outcomes["loaded"] > 50
