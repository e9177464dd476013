"""
Attack the library on tiny random models, and count what is wrong afterwards: `python benchmarks/attack.py`.

Exceptions are put in at every line of its calls, signals are sent in the middle of them, threads ask a model while
others edit it, processes that write are killed, and files are altered before they are loaded. Nothing may be between
two states, no answer another than its state's, nothing lost, and no file may take long, much memory, or the process.
Runs on Linux, needs no data, and writes JSON and Markdown. Each part ends after its share of `--minutes`, and says how
far it came.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from support import kills, signals  # noqa: E402
from support.altered_files import make_material, run_case  # noqa: E402
from support.edits import random_edit  # noqa: E402
from support.injection import InjectedError, some_of  # noqa: E402
from support.interrupts import checked, interrupted_merges, kinds  # noqa: E402
from support.models import RECORDS, all_logits, build_model, editable, make_tokenizer  # noqa: E402
from support.reading import asked_meanwhile  # noqa: E402
from support.scope import scoped  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hf_mend import Edit, EditStore  # noqa: E402


PARTS = ["lines", "signals", "threads", "kills", "files", "many"]
SECONDS_A_FILE, GIGABYTES = 10, 2
Figures = dict[str, Any]


class Clock:
    """The time that a part has."""

    def __init__(self, minutes: float):
        self.start, self.seconds = time.monotonic(), 60 * minutes

    def has_more(self, share: float = 1.0) -> bool:
        return time.monotonic() - self.start < self.seconds * share


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exceptions", type=int, default=10_000, help="exceptions put in at lines")
    parser.add_argument("--signals", type=int, default=1_000, help="signals sent into calls")
    parser.add_argument("--reads", type=int, default=10_000, help="answers asked for beside edits and undos")
    parser.add_argument("--kills", type=int, default=500, help="processes killed")
    parser.add_argument("--files", type=int, default=10_000, help="files altered")
    parser.add_argument("--edits", type=int, default=50_000, help="edits of the large store")
    parser.add_argument("--minutes", type=float, default=10.0, help="at most, for each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="add to the counts that are kept; give another seed")
    parser.add_argument("--mended", action="store_true", help="what was found wrong is mended: begin to count anew")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of what is tried; others stay")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "attack"))
    return parser.parse_args()


def lines(count: int, clock: Clock, rng: random.Random) -> Figures:
    """Exceptions at lines of calls: each line of the source that a call runs, at one time or another of it."""
    tokenizer, injected, wrong = make_tokenizer(), Counter[str](), []
    errors = (KeyboardInterrupt, MemoryError, InjectedError)
    every = [*kinds(), ("merge_and_unload", False, False)]
    for turn, kind in enumerate(every):
        name, share = _name(kind), (turn + 1) / len(every)
        with tempfile.TemporaryDirectory() as folder:
            if name == "merge_and_unload":
                attack, all_lines = interrupted_merges(tokenizer)
            else:
                model = checked(kind[0], tokenizer, Path(folder), *kind[1:])
                attack, all_lines = model.interrupt, model.lines
            aim, done = (count * (turn + 1)) // len(every) - sum(injected.values()), 0
            while done < aim and clock.has_more(share):
                numbers = some_of(all_lines, min(50, aim - done), rng.random())
                found = attack(numbers, errors[rng.randrange(3)])
                done += len(numbers)
                wrong += [f"{name}: {one}" for one in found]
            injected[name] += done
            if name != "merge_and_unload":
                model.model.close_store()
    return {"tried": sum(injected.values()), "wrong": len(wrong), "what": wrong[:20], "of": dict(injected)}


def sent_signals(count: int, clock: Clock, rng: random.Random) -> Figures:
    """SIGINT at random moments of the same calls."""
    tokenizer, sent, met, wrong = make_tokenizer(), Counter[str](), 0, []
    every = kinds()
    for turn, kind in enumerate(every):
        name, share = _name(kind), (turn + 1) / len(every)
        with tempfile.TemporaryDirectory() as folder:
            model = checked(kind[0], tokenizer, Path(folder), *kind[1:])
            aim = (count * (turn + 1)) // len(every) - sum(sent.values())
            while sent[name] < aim and clock.has_more(share):
                number = min(5, aim - sent[name])
                some, found = signals.attack(model, rng, number)
                sent[name] += number
                met += some
                wrong += [f"{name}, {one}" for one in found]
            model.model.close_store()
    figures = {"tried": sum(sent.values()), "met the call": met}
    return figures | {"wrong": len(wrong), "what": wrong[:20], "of": dict(sent)}


def threads(count: int, clock: Clock, rng: random.Random) -> Figures:
    """Answers of two threads, each compared with those of the states that a third goes through."""
    tokenizer, read, wrong, changes = make_tokenizer(), Counter[str](), [], 0
    asked, other = RECORDS[3].prompt, RECORDS[4].prompt
    kinds_of_model = [("edits that act everywhere", editable), ("edits with a scope", scoped), ("a store", editable)]
    for turn, (name, make) in enumerate(kinds_of_model):
        model, text = make(build_model("llama"), tokenizer), f"{other} rome" if make is scoped else asked
        targets, share = ("rome", "oslo town", "lima"), (turn + 1) / len(kinds_of_model)
        states = [all_logits(model, tokenizer, text)]
        for target in targets:
            model.edit(other, target, max_steps=1, force=True)
            states.append(all_logits(model, tokenizer, text))
        model.undo_all()
        with tempfile.TemporaryDirectory() as folder:
            if name == "a store":
                model.open_store(Path(folder) / "store")
            aim = (count * (turn + 1)) // len(kinds_of_model) - sum(read.values())
            while read[name] < aim and clock.has_more(share):
                answers: list[int] = []
                try:
                    ask: Callable[[], torch.Tensor] = lambda m=model, t=text: all_logits(m, tokenizer, t)  # noqa: E731
                    with asked_meanwhile(ask, states, 2) as answers:  # all of them while it changes
                        for target in targets:
                            model.edit(other, target, max_steps=1, force=True)
                        for _ in targets:
                            model.undo()
                        changes += 6
                except AssertionError as error:
                    wrong.append(f"{name}: {error}")
                read[name] += sum(answers)
            model.close_store()
    return {"tried": sum(read.values()), "edits and undos": changes, "wrong": len(wrong), "what": wrong[:20],
            "of": dict(read)}  # fmt: skip


def killed(count: int, clock: Clock, rng: random.Random) -> Figures:
    """Processes that edit, save and train, killed at random moments."""
    tokenizer, done, wrong = make_tokenizer(), Counter[str](), []
    for turn, kind in enumerate(kills.KINDS):
        share = (turn + 1) / len(kills.KINDS)
        aim = (count * (turn + 1)) // len(kills.KINDS) - sum(done.values())
        with tempfile.TemporaryDirectory() as folder:
            while done[kind.name] < aim and clock.has_more(share):
                number = min(5, aim - done[kind.name])
                wrong += [f"{kind.name}: {one}" for one in kills.attack(kind, Path(folder), tokenizer, rng, number)]
                done[kind.name] += number
    return {"tried": sum(done.values()), "wrong": len(wrong), "what": wrong[:20], "of": dict(done)}


def files(count: int, clock: Clock, rng: random.Random) -> Figures:
    """Altered files, loaded in processes with bounded memory that are watched."""
    outcomes, wrong, slowest = Counter[str](), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        material, first = make_material(Path(folder), make_tokenizer()), rng.randrange(10**9)
        following = first
        while following < first + count and clock.has_more():
            for number, outcome, seconds in _in_a_worker(material, range(following, first + count), clock):
                following = number + 1
                slowest = max(slowest, seconds)
                outcomes[outcome if outcome in ("refused", "loaded") else "wrong"] += 1
                if outcome not in ("refused", "loaded"):
                    wrong.append(outcome)
    figures = {"tried": sum(outcomes.values()), "refused": outcomes["refused"], "loaded": outcomes["loaded"]}
    return figures | {"slowest, s": slowest, "wrong": len(wrong), "what": wrong[:20]}


def _in_a_worker(material: Any, numbers: range, clock: Clock) -> Any:
    """Yield number, outcome and seconds of cases, until a process dies of one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (GIGABYTES << 30),) * 2)
            for number in numbers:
                start = time.monotonic()
                outcome = run_case(number, material)
                line = json.dumps([number, outcome[:500], time.monotonic() - start]) + "\n"
                os.write(writing, line.encode())
        finally:
            os._exit(0)
    os.close(writing)
    last, buffer = numbers.start - 1, b""
    try:
        while last < numbers.stop - 1 and clock.has_more():
            ready, _, _ = select.select([reading], [], [], 3 * SECONDS_A_FILE)  # the machine does other things too
            more = os.read(reading, 1 << 16) if ready else b""
            if not more:
                yield last + 1, f"case {last + 1}: the process {'died' if ready else 'hung'}", float(SECONDS_A_FILE)
                return
            *whole, buffer = (buffer + more).split(b"\n")
            for line in whole:
                last, outcome, seconds = json.loads(line)
                if outcome in ("refused", "loaded") and seconds > SECONDS_A_FILE:
                    outcome = f"case {last}: took {seconds:.0f} s"
                yield last, outcome, seconds
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


def many(count: int, clock: Clock, rng: random.Random) -> Figures:
    """Stores of so many edits, which act everywhere or have a scope: to open them, and to add to them."""
    tokenizer = make_tokenizer()
    found: Figures = {"edits": count}
    for name, make in (("act everywhere", editable), ("have a scope", scoped)):
        model = make(build_model("llama"), tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = _large_store(model, Path(folder) / "store", count)
        model.close_store()
    return found


def _large_store(model: Any, path: Path, count: int) -> Figures:
    model.edit(RECORDS[0].prompt, "rome", max_steps=1, force=True)
    pattern = model.edits[0]
    model.undo_all()
    if pattern.scope is None:
        pool = [(random_edit(model, "", 1, seed).updates, None) for seed in range(50)]
    else:
        keys = torch.nn.functional.normalize(torch.randn(50, *pattern.scope.keys.shape), dim=-1)
        pool = [(pattern.updates, replace(pattern.scope, keys=one)) for one in keys]
    every = [(f"e{i}", f"the prompt of {i}", *pool[i % 50]) for i in range(count)]
    EditStore(path).append(
        [Edit(one, prompt, "rome", updates, {}, scope=scope) for one, prompt, updates, scope in every]
    )
    del every
    figures: Figures = {"MB": path.stat().st_size / 1e6}

    def measured(what: str, *calls: Callable[[], object]) -> None:
        times = []
        for call in calls:
            start, began = time.process_time(), time.perf_counter()
            call()
            times.append((time.process_time() - start, time.perf_counter() - began))
        figures[what] = sorted(times)[len(times) // 2]

    measured("to open it in a model", lambda: model.open_store(path))
    assert len(model.edits) == count
    measured("the first pass", lambda: all_logits(model, model.tokenizer))
    measured("a later pass", *[lambda: all_logits(model, model.tokenizer)] * 5)
    store, new = EditStore(path), [random_edit(model, f"new{seed}", 1, seed) for seed in range(20)]
    measured("to append one", *[lambda one=one: store.append([one]) for one in new])
    prompts = [f"{RECORDS[0].prompt} {'is ' * seed}" for seed in range(3)]
    measured("an edit of the model", *[lambda p=p: model.edit(p, "rome", max_steps=1, force=True) for p in prompts])
    measured("an undo of the last", model.undo)
    return figures


def _name(kind: tuple[str, bool, bool]) -> str:
    return kind[0] + (", with a scope" if kind[1] else "") + (", with a store" if kind[2] else "")


def added(before: Figures, now: Figures) -> Figures:
    """What two runs of a part count together."""
    whole = dict(now)
    for name, value in before.items():
        if name == "mended before":
            continue
        if name == "of":
            whole["of"] = dict(Counter(value) + Counter(now["of"]))
        elif name == "what":
            whole["what"] = [*value, *now["what"]][:20]
        else:
            whole[name] = max(value, now[name]) if name.startswith("slowest") else value + now[name]
    return whole


def mended_before(before: Figures, mended: bool) -> Figures:
    """Keep what was found wrong before it was mended."""
    earlier = before.get("mended before", {"tried": 0, "wrong": 0, "what": []})
    if mended and before.get("wrong"):
        what = [*earlier["what"], *(one[:200] for one in before["what"])]
        earlier = {
            "tried": earlier["tried"] + before["tried"],
            "wrong": earlier["wrong"] + before["wrong"],
            "what": what,
        }
    return {"mended before": earlier} if earlier["wrong"] else {}


def as_markdown(results: dict[str, Figures]) -> str:
    titles = {
        "lines": ("exceptions put in at lines", "neither before the call nor after it, or something is left"),
        "signals": ("SIGINT in the middle of a call", "the same"),
        "threads": ("answers beside edits and undos", "rounds with an answer that is no state's"),
        "kills": ("kill -9 of a process that writes", "lost, or half there"),
        "files": ("altered files", f"over {SECONDS_A_FILE} s or {GIGABYTES} GB, a crash, or loaded as another"),
    }
    out = ["# What attacks leave", "", "Written by `python benchmarks/attack.py`, on tiny random models.", ""]
    out += ["| attack | tried | wrong | wrong is |", "|---|---|---|---|"]
    for part, (what, means) in titles.items():
        if part in results:
            out.append(f"| {what} | {results[part]['tried']:,} | {results[part]['wrong']:,} | {means} |")
    for part, (what, _) in titles.items():
        found = results.get(part, {})
        more = {k: v for k, v in found.items() if k not in ("tried", "wrong", "what", "of", "mended before")}
        if more:
            values = ", ".join(f"{k} {v:,.2f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in more.items())
            out += ["", f"{what[0].upper()}{what[1:]}: {values}."]
        if "of" in found:
            out += ["", f"| {what} of | tried |", "|---|---|", *(f"| {k} | {v:,} |" for k, v in found["of"].items())]
        if found.get("what"):
            out += ["", "What was wrong:", "", *(f"- `{one}`" for one in found["what"])]
    for part, (what, _) in titles.items():
        if before := results.get(part, {}).get("mended before"):
            out += ["", f"Before what was found was mended, {before['tried']:,} {what} had these wrong:", ""]
            out += [f"- `{one}`" for one in before["what"]]
    for name, found in results.get("many", {}).items():
        if isinstance(found, dict):
            edits = f"a store of {results['many']['edits']:,} edits that {name}, {found['MB']:.0f} MB"
            out += [
                "",
                f"| {edits} | CPU seconds | seconds that passed, beside other work on the machine |",
                "|---|---|---|",
            ]
            out += [f"| {k} | {v[0]:.3f} | {v[1]:.3f} |" for k, v in found.items() if k != "MB"]
    return "\n".join(out) + "\n"


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    output = Path(arguments.output)
    kept = json.loads(output.with_suffix(".json").read_text()) if output.with_suffix(".json").exists() else {}
    work: dict[str, tuple[Callable[..., Figures], int]] = {
        "kills": (killed, arguments.kills),  # first: a process that has run a backward pass cannot fork one that does
        "files": (files, arguments.files),
        "lines": (lines, arguments.exceptions),
        "signals": (sent_signals, arguments.signals),
        "threads": (threads, arguments.reads),
        "many": (many, arguments.edits),
    }
    for part, (attack, count) in work.items():
        if part in arguments.parts and count:
            found = attack(count, Clock(arguments.minutes), random.Random(arguments.seed))
            before = kept.get(part, {})
            kept[part] = added(before, found) if arguments.add and before and part != "many" else found
            kept[part] |= mended_before(before, arguments.mended)
            print(part, {name: value for name, value in kept[part].items() if name != "of"}, flush=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.with_suffix(".json").write_text(json.dumps(kept, indent=2) + "\n")
            output.with_suffix(".md").write_text(as_markdown(kept))


if __name__ == "__main__":
    main()
