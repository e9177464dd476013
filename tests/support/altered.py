"""Bytes, JSON values, headers, tensors and records of files, altered as by a broken disk or an attacker."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from hf_mend.edits.log import EDIT, MAGIC, NOTE, Framer, Place, scan


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


def mutated_tensors(rng: random.Random, content: bytes) -> bytes:
    """A whole safetensors file, of which tensors have other shapes, types, names or values than the rest says."""
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__")
    tensors = load(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not tensors:
            break
        name = rng.choice(sorted(tensors))
        value = tensors[name]
        what = rng.randrange(9)
        if what == 0:
            del tensors[name]
        elif what == 1:
            tensors[name.replace(rng.choice("uvAB0123"), rng.choice(["u", "v", "1", "x", "keys"]), 1)] = value.clone()
        elif what == 2:
            tensors[name] = value[..., : value.shape[-1] // 2].contiguous() if value.dim() else value
        elif what == 3:
            tensors[name] = value.T.contiguous() if value.dim() == 2 else value[None].contiguous()
        elif what == 4:
            tensors[name] = value.to(rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.uint8]))
        elif what == 5:
            tensors[name] = torch.cat([value, value]) if value.dim() else value
        elif what == 6:
            tensors[name] = tensors[rng.choice(sorted(tensors))].clone()
        elif what == 7:
            tensors[name] = value[:0].contiguous() if value.dim() else value
        else:
            flat = value.clone()
            worst = [float("nan"), float("inf"), 3e38, -3e38, 1e-45] if value.is_floating_point() else [0, 255, 128]
            flat.view(-1)[: rng.choice([1, 7, flat.numel()])] = rng.choice(worst)
            tensors[name] = flat
    return save(tensors, metadata=metadata)


def mutated_records(rng: random.Random, path: Path) -> bytes:
    """A store whose frames and checksums fit, but whose records do not."""
    content = path.read_bytes()
    with open(path, "rb") as file:
        records, _ = scan(file, path, Place())
    payloads = [(r.kind, content[r.start : r.start + r.length]) for r in records]
    at = rng.randrange(len(payloads))
    kind, payload = payloads[at]
    what = rng.randrange(6)
    if what == 0:
        del payloads[at]
    elif what == 1:
        payloads.insert(rng.randrange(len(payloads) + 1), (kind, payload))
    elif what == 2:
        payloads[at] = (rng.choice([EDIT, NOTE]), payload)
    elif kind == NOTE:
        payloads[at] = (kind, mutated_json(rng, payload.decode()).encode("utf-8", "surrogatepass"))
    elif what == 3:
        payloads[at] = (kind, mutated_header(rng, payload, [payload for k, payload in payloads if k == EDIT]))
    else:
        payloads[at] = (kind, mutated_tensors(rng, payload))
    framer, data = Framer(Place(end=len(MAGIC))), MAGIC
    for number, (kind, payload) in enumerate(payloads):
        data += framer.frame(kind, payload)
        if number == len(payloads) - 1 or rng.random() < 0.3:
            data += framer.commit()
    return data


def mutated(rng: random.Random, path: Path, others: list[bytes]) -> bytes:
    """A file's content, altered in one of these ways that it bears."""
    content = path.read_bytes()
    if rng.random() < 0.3:
        return mutated_bytes(rng, content)
    if path.suffix == ".json":
        return mutated_json(rng, content.decode()).encode("utf-8", "surrogatepass")
    if path.suffix == ".store":
        return mutated_records(rng, path)
    if rng.random() < 0.4:
        return mutated_tensors(rng, content)
    return mutated_header(rng, content, others)
