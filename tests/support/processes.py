"""
Processes of their own that begin at once: a server that has imported PyTorch and Transformers, though nothing of
hf_mend, forks them. What `python` is given runs as it would there.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


# The server begins with the first process, so that it has the environment that conftest.py has set.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        *("pytest", "accelerate", "datasets", "peft", "transformers.trainer", "typer.testing", "yaml"),
        *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "t5", "bart")),
    ]
)


@dataclass
class Done:
    """How a process ended, and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


@dataclass
class Running:
    process: BaseProcess
    output: tempfile.TemporaryDirectory[str]

    def wait(self, seconds: float = 300) -> Done:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        texts = [(Path(self.output.name) / name).read_text() for name in ("stdout", "stderr")]
        self.output.cleanup()
        return Done(self.process.exitcode, *texts)


def start_python(*words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Running:
    """As `python WORDS`, where the words begin with `-c CODE`, `-m MODULE` or a script."""
    output = tempfile.TemporaryDirectory()
    given = {**os.environ} if env is None else {**env}
    process = FORKED.Process(
        target=_python, args=([str(word) for word in words], given, str(cwd or Path.cwd()), output.name)
    )
    process.start()
    return Running(process, output)


def run_python(*words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    return start_python(*words, env=env, cwd=cwd).wait()


def run_ranks(count: int, *words: object, env: Mapping[str, str], cwd: Path | None = None) -> list[Done]:
    """The same in so many processes that know of one another, as PyTorch's and Accelerate's launchers start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        start_python(*words, cwd=cwd, env={**env, **{name: str(value) for name, value in given.items()}})
        for given in ({**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count))
    ]
    return [one.wait() for one in running]


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A function of a module of support in a process of its own."""
    process = FORKED.Process(target=function, args=arguments)
    process.start()
    return process


def _python(words: Sequence[str], env: Mapping[str, str], cwd: str, output: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    kind, *rest = words
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = ["" if kind in ("-c", "-m") else str(Path(kind).parent), *paths]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*words]
        runpy.run_path(kind, run_name="__main__")
