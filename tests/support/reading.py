"""Threads that ask a model beside others that change it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


def at_once(*works: Callable[[], object]) -> None:
    """Run some functions in threads that begin together, and raise what one of them raises."""
    start, errors = threading.Barrier(len(works)), []

    def run(work: Callable[[], object]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def is_one_of(answer: torch.Tensor, states: Sequence[torch.Tensor]) -> bool:
    return any(torch.equal(answer, state) for state in states)


def hooks_of(model: torch.nn.Module) -> list[object]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@contextmanager
def asked_meanwhile(
    ask: Callable[[], torch.Tensor], states: Sequence[torch.Tensor], count: int
) -> Iterator[list[int]]:
    """
    Ask at least so often, in two threads, while the context runs, and expect one of the states' answers. What is
    yielded has the number of answers of each thread in the end.
    """
    going, wrong, asked = threading.Event(), [], []
    going.set()

    def read() -> None:
        mine = 0
        while going.is_set() or mine < count // 2:
            mine += 1
            answer = ask()
            if not is_one_of(answer, states):
                wrong.append(answer)
        asked.append(mine)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        going.clear()
        for thread in threads:
            thread.join()
    assert len(asked) == 2 and not wrong, f"{len(wrong)} of {sum(asked)} answers are no state's"
