"""How many tokens go into one pass of a call: as many as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

Found = TypeVar("Found")

# Before a pass's cost is measured, or where it cannot be: so many rows and tokens, padding included.
_ROWS, _TOKENS = 16, 4096
# More tokens make a pass no faster a token: on a CPU, where more rows do not either, and on an accelerator.
_MOST_ON_CPU, _MOST = 4096, 131_072
# The share of the free memory that a pass may take.
_SHARE = 0.6


@dataclass
class Budget:
    """
    How many tokens go into one pass. The first pass on a CUDA device is a small one, whose peak tells what a token
    costs; on a CPU the cost is an estimate. A pass that runs out of memory is halved, and so are those that follow.

    Args:
        device (`torch.device`): Where the passes run.
        estimate (`float`): About how many bytes a token takes, its logits included.
        rows (`int`, *optional*): The most requests in a pass.
        fixed (`bool`, defaults to `False`): Results depend on which requests share a pass, so that memory must not.
    """

    device: torch.device
    estimate: float
    rows: int | None = None
    fixed: bool = False
    measured: float | None = None
    limit: int | None = None

    @property
    def most_rows(self) -> int:
        """The most requests in the next pass."""
        return self.rows or (_ROWS if self.fixed or self.measured is None else 1_000_000)

    @property
    def tokens(self) -> int:
        """The most tokens in the next pass, padding included."""
        return min(self._fitting, self.limit or self._fitting)

    @property
    def _fitting(self) -> int:
        free = free_memory(self.device)
        if free is None or self.fixed:
            return _TOKENS
        if self.device.type == "cpu":
            return tokens_that_fit(free, self.estimate, _MOST_ON_CPU)
        if self.measured is None:
            return tokens_that_fit(free, self.estimate, _TOKENS)
        return tokens_that_fit(free, self.measured, _MOST)

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether requests of these lengths go into one pass."""
        return len(lengths) <= self.most_rows and max(lengths, default=0) * len(lengths) <= self.tokens

    @contextmanager
    def measuring(self, tokens: int) -> Iterator[None]:
        """Measure what a pass of so many tokens takes at its peak, unless it is known."""
        if self.device.type != "cuda" or self.measured is not None:
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        self.measured = max(1.0, (torch.cuda.max_memory_allocated(self.device) - before) / max(1, tokens))

    def halve(self, tokens: int) -> None:
        """Let further passes take half of what one of so many tokens took, which was too much."""
        self.limit = max(1, tokens // 2)
        logger.warning(f"a pass of {tokens} tokens ran out of memory; it is tried again with half of them")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def tokens_that_fit(free: int, bytes_a_token: float, most: int) -> int:
    """
    Return how many tokens a pass may have.

    Args:
        free (`int`): Bytes that are free.
        bytes_a_token (`float`): Bytes that a token takes.
        most (`int`): The most tokens.
    """
    return max(1, min(most, int(_SHARE * free / bytes_a_token)))


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes are free on a device, `None` where it does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return available_on_host()
    return None


def available_on_host(path: Path = Path("/proc/meminfo")) -> int | None:
    """Return how many bytes of the host's memory are available, `None` where the system does not tell."""
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def estimated_cost(model: Any, blocks: int) -> float:
    """
    Return about how many bytes a token takes in a pass with its backward pass, its logits included.

    Args:
        model (`PreTrainedModel`): The base model.
        blocks (`int`): From how many blocks the backward pass comes.
    """
    config = model.config.get_text_config(decoder=True)
    vocabulary, width = (getattr(config, name, None) for name in ("vocab_size", "hidden_size"))
    # Logits, their log-softmax and its gradient; of each block its inputs and its MLP's, and their gradients.
    return 4.0 * (3 * (vocabulary or 50_000) + 24 * (width or 4096) * max(1, blocks))


def in_passes(
    budget: Budget, items: Sequence[int], lengths: Sequence[int], run: Callable[[list[int]], Found]
) -> Iterator[tuple[list[int], Found]]:
    """
    Run some items in passes of like lengths, as large as the budget allows.

    Args:
        budget ([`Budget`]): The budget.
        items (`Sequence[int]`): The items.
        lengths (`Sequence[int]`): The number of tokens of each.
        run (`Callable`): Runs some items in one pass. After an `OutOfMemoryError` it is called again with fewer.
    """
    left = sorted(range(len(items)), key=lambda k: lengths[k])
    while left:
        count = _fitting(budget, [lengths[k] for k in left])
        batch, tokens = [items[k] for k in left[:count]], count * lengths[left[count - 1]]
        found = tried(budget, tokens, count > 1, lambda batch=batch: run(batch))  # type: ignore[misc]
        if found:
            yield batch, found[0]
            left = left[count:]


def tried(budget: Budget, tokens: int, may_halve: bool, run: Callable[[], Found]) -> list[Found]:
    """Return what `run` gives, or nothing where it ran out of memory and the budget is halved."""
    try:
        with budget.measuring(tokens):
            return [run()]
    except torch.cuda.OutOfMemoryError:
        if not may_halve:
            raise
    budget.halve(tokens)  # behind the handler: what the error's frames held is free
    return []


def _fitting(budget: Budget, lengths: Sequence[int]) -> int:
    """Return how many of some rows, the shortest first, go into the next pass."""
    rows, tokens = budget.most_rows, budget.tokens
    count = 1
    while count < min(len(lengths), rows) and lengths[count] * (count + 1) <= tokens:
        count += 1
    return count
