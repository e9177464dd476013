"""
Files as an attacker or a broken disk may leave them: each is a clear error or a correct load, never a crash, a hang, a
changed model, or memory that the file itself does not have.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import hashlib
import json
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import RECORDS, EditableModel, build_model, editable, small_config

from hf_mend import EditorConfig, get_editable_model


SECONDS_A_CASE = 20  # on a machine that does other things too; most take some milliseconds
MEGABYTES = 400

LITERALS = [
    "null", "true", "-1", "0", "1", "3.5", "1e400", "-1e400", "NaN", "1e308", "65536", "65537", str(2**31), str(2**63),
    str(10**30), "9" * 5000, '""', '"x"', '"../../outside"', '"/etc/passwd"', '"editor.safetensors"', '"\\u0000"',
    '"\\ud800"', '"\\u202e\\u0041\\u0301"', json.dumps("x" * 100_000), json.dumps("(a+)+$"), json.dumps("(.*)*(?<=!)"),
    json.dumps("((((((.*)*)*)*)*)*)\\1"), json.dumps("(" * 1500), json.dumps("[" * 10), "[]", "{}", "[[]]", "[null]",
    '["a", 1]', "[1.5]", "[-1]", "[true]", str(list(range(20_000))), json.dumps(["mlp"] * 20_000), '{"a": 1, "a": 2}',
    "[" * 100_000 + "]" * 100_000, '{"a":' * 60 + "1" + "}" * 60, "[1, 2", '{"__class__": "os.system"}',
    '"F64"', '"F16"', '"BF16"', '"I64"', '"BOOL"', '"F8_E4M3"', '"f32"', "[0, 0]", "[4294967296, 4294967296]",
    "[1, 1, 1, 1, 1, 1, 1, 1, 1]", "[9223372036854775807, 2]", '"trust_remote_code"', '"mend"', '"paper"', '"default"',
]  # fmt: skip
MARK = "\x00literal\x00"


@pytest.fixture(scope="module")
def material(tmp_path_factory, tokenizer):
    """Folders of good files: an editor, the same in shards, and edits."""
    place = tmp_path_factory.mktemp("good")
    base = build_model("llama")
    torch.manual_seed(0)
    model = get_editable_model(base, small_config(rank=2, whiten_rank=2), tokenizer)
    model.save_pretrained(place / "editor")
    model.save_pretrained(place / "shards", max_shard_size=3000)
    edited = editable(copy.deepcopy(base), tokenizer, rank=2)
    edited.edit([r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]])
    edited.save_edits(place / "edits")
    fresh = editable(copy.deepcopy(base), tokenizer, rank=2)
    return place, base.train().requires_grad_(True), fresh


def digest(model: torch.nn.Module) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(name.encode() + value.numpy().tobytes())
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()] + [
        p.requires_grad for p in model.parameters()
    ]
    return whole.hexdigest() + str(flags)


# ---- mutations ----


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    start, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 8, 100, len(data) // 2])
    what = rng.randrange(8)
    if what == 0:
        for _ in range(rng.choice([1, 1, 3, 50])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == 1:
        del data[start:]
    elif what == 2:
        del data[start : start + length]
    elif what == 3:
        data[start:start] = rng.randbytes(length)
    elif what == 4:
        data[start:start] = data[start : start + length]
    elif what == 5:
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif what == 6:
        data = data[start:] + data[:start]
    else:
        data[:8] = rng.choice([bytes(8), b"\xff" * 8, (len(data) - 8).to_bytes(8, "little"), rng.randbytes(8)])
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something can be changed."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path + (key,) for key, _ in inner] + [p for key, item in inner for p in places(item, path + (key,))]


def mutated_json(rng: random.Random, text: str) -> str:
    values = json.loads(text)
    literals = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        spots = places(values)
        if not spots:
            break
        # The few fields at the top as often as the many below.
        spot = rng.choice(spots if rng.random() < 0.5 else [s for s in spots if len(s) == 1])
        parent = values
        for key in spot[:-1]:
            parent = parent[key]
        what, key = rng.randrange(10), spot[-1]
        if what < 6:
            parent[key] = MARK
            literals.append(rng.choice(LITERALS))
        elif what == 6:
            del parent[key]
        elif what == 7 and isinstance(parent, dict):
            parent[rng.choice(["", "x" * 1000, "é\u0301", "../a", "a\nb", "trust_remote_code"])] = parent.pop(key)
        else:
            other = rng.choice(spots)
            source = values
            for step in other:
                source = source[step] if not isinstance(source, (str, int, float, type(None))) else source
            parent[key] = copy.deepcopy(source)
    text = json.dumps(values)
    for literal in literals:
        text = text.replace(json.dumps(MARK), literal, 1)
    return text


def mutated_header(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size].decode(), content[8 + size :]
    what = rng.randrange(5)
    if what == 0:  # another file's header before this one's tensors
        other = rng.choice(others)
        header = other[8 : 8 + int.from_bytes(other[:8], "little")].decode()
    elif what == 1 and "__metadata__" in json.loads(header):
        values = json.loads(header)
        name = rng.choice(sorted(values["__metadata__"]))
        with contextlib.suppress(ValueError):
            inner = values["__metadata__"][name]
            values["__metadata__"][name] = mutated_json(rng, inner)
        header = json.dumps(values)
    else:
        header = mutated_json(rng, header)
    raw = header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + (body if rng.random() < 0.8 else mutated_bytes(rng, body or b"\0"))


def mutated(rng: random.Random, path: Path, others: list[bytes]) -> bytes:
    content = path.read_bytes()
    if rng.random() < 0.3:
        return mutated_bytes(rng, content)
    if path.suffix == ".json":
        return mutated_json(rng, content.decode()).encode("utf-8", "surrogatepass")
    return mutated_header(rng, content, others)


# ---- the test ----


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


def run_case(number: int, material: Any, tokenizer: Any) -> str:
    place, base, fresh = material
    rng = random.Random(f"hf_mend {number}")
    folder = place / rng.choice(["editor", "editor", "shards", "edits"])
    path = rng.choice(sorted(p for p in folder.iterdir() if p.name != "README.md"))
    good = path.read_bytes()
    others = [p.read_bytes() for p in sorted(place.glob("*/*.safetensors"))]
    path.write_bytes(mutated(rng, path, others))
    try:
        return outcome(number, folder, base, fresh, tokenizer)
    finally:
        path.write_bytes(good)


def outcome(number: int, folder: Path, base: Any, fresh: Any, tokenizer: Any) -> str:
    model = fresh.base_model if folder.name == "edits" else base
    before = digest(model)
    loaded: Any = None
    try:
        with time_limit(SECONDS_A_CASE):
            if folder.name == "edits":
                loaded = fresh.load_edits(folder)
            else:
                loaded = EditableModel.from_pretrained(base, folder, tokenizer)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        assert type(error) in (ValueError, FileNotFoundError), f"case {number}: {type(error)} {error}"
        assert 20 < len(said) < 5000, f"case {number}: {said[:300]}"
        said.encode()
        assert any(word in said for word in ("EditorConfig", "target_modules", "layers_pattern", str(folder))), said
        assert digest(model) == before, f"case {number} changed the model"
        return "refused"
    check_loaded(number, loaded, fresh, base, folder)
    assert digest(model) == before, f"case {number} changed the model"
    return "loaded"


def check_loaded(number: int, loaded: Any, fresh: Any, base: Any, folder: Path) -> None:
    """What was loaded is what another reader finds in the files."""
    if isinstance(loaded, EditableModel):
        tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
        state = loaded.editor.state_dict()
        assert state.keys() == tensors.keys(), number
        assert all(torch.equal(value, tensors[name].float()) for name, value in state.items()), number
        config = EditorConfig.from_dict(json.loads((folder / "editor_config.json").read_text()))
        config.task_type = config.task_type or "CAUSAL_LM"  # left open, it is found from the base
        assert loaded.editor_config == config, number
        assert all(torch.isfinite(value).all() for value in state.values())
        base.train().requires_grad_(True)
    else:
        assert all(torch.isfinite(x).all() for edit in loaded for pair in edit.updates.values() for x in pair), number
        fresh.undo_all()


def run_cases(numbers: range, material: Any, tokenizer: Any) -> Counter[str]:
    start = peak(reset=True)
    outcomes: Counter[str] = Counter()
    try:
        for number in numbers:
            if number % 100 == 0:  # for code that lets no signal through
                faulthandler.dump_traceback_later(100 * SECONDS_A_CASE, exit=True)
            outcomes[run_case(number, material, tokenizer)] += 1
            assert peak() - start < MEGABYTES, f"case {number} took {peak() - start} MB"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return outcomes


def test_some_damaged_files(material, tokenizer):
    outcomes = run_cases(range(200), material, tokenizer)
    assert outcomes["refused"] > 100 and outcomes["loaded"] > 5, "both happen"


@pytest.mark.slow
def test_two_thousand_damaged_files(material, tokenizer):
    outcomes = run_cases(range(2000), material, tokenizer)
    assert sum(outcomes.values()) == 2000
    assert outcomes["refused"] > 1000 and outcomes["loaded"] > 50
