"""What the un-edited model says where nothing may change, kept on the disk: it is the same in every step."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.encoding import EncodedBatch, Encoder, Query, batches, length_batches
from ..hub.files import write_tensors
from .token_ids import token_ids


logger = logging.get_logger(__name__)

# Texts a file: what an interrupt may lose.
_EACH = 2000


class UneditedOutputs:
    """
    The inputs of the vocabulary projection at the positions of texts' answers, in float32: a few thousand bytes each.

    They are held in files that are written whole, each with a checksum; one that was altered is left out, and what it
    held is computed anew.

    Args:
        folder (`Path`): The folder, of one model's weights.
        limit (`float`): The largest size in bytes; what goes beyond it is computed at each use.
    """

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit
        self._values: dict[bytes, torch.Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*.safetensors")):
            self._read(file)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Return the size of what is kept in bytes."""
        return sum(value.numel() * value.element_size() for value in self._values.values())

    def __call__(self, rows: EncodedBatch) -> torch.Tensor | None:
        """Return what is kept of the rows, `(positions, width)`, or `None` where a row is missing."""
        found = [self._values.get(key) for key in _keys(rows)]
        kept = [one for one in found if one is not None]
        return torch.cat(kept).to(rows.positions.device) if len(kept) == len(found) else None

    def fill(
        self,
        encoder: Encoder,
        queries: Iterable[Query],
        read: Callable[[EncodedBatch], torch.Tensor],
        batch_tokens: int = 2048,
        progress: bool = True,
    ) -> None:
        """
        Compute and keep what is said at texts that are missing, as far as the limit allows.

        Args:
            encoder ([`Encoder`]): The encoder of the texts.
            queries (`Iterable[Query]`): The texts, in which repetitions are allowed.
            read (`Callable`): The texts -> what is said, `(positions, width)`.
            batch_tokens (`int`, defaults to 2048): Tokens a pass.
            progress (`bool`, defaults to `True`): Show a progress bar.
        """
        wanted = {key: query for query in dict.fromkeys(queries) for key in _keys(encoder([query]))}
        missing = [query for key, query in wanted.items() if key not in self._values]
        with tqdm(total=len(missing), desc="Un-edited answers", disable=not progress) as bar:
            for some in batches(missing, _EACH):
                new: dict[bytes, torch.Tensor] = {}
                lengths = [len(prompt) + len(answer) for prompt, answer in map(encoder.tokens, some)]
                for chunk in length_batches(lengths, len(some), batch_tokens):
                    rows = encoder([some[i] for i in chunk])
                    values = read(rows).float().cpu().split(rows.places.counts)
                    new.update(zip(_keys(rows), (value.clone() for value in values), strict=True))
                    bar.update(len(chunk))
                if self.nbytes + sum(value.numel() * 4 for value in new.values()) > self.limit:
                    return
                self._write(new)
                self._values.update(new)

    def _write(self, new: dict[bytes, torch.Tensor]) -> None:
        values = torch.cat([*new.values()])
        keys = torch.frombuffer(bytearray(b"".join(new)), dtype=torch.uint8)  # 16 bytes each
        counts = torch.tensor([len(value) for value in new.values()])
        tensors = {"keys": keys, "counts": counts, "values": values}
        name = hashlib.blake2b(b"".join(new), digest_size=8).hexdigest()
        write_tensors(self.folder / f"{name}.safetensors", tensors, {"checksum": _checksum(tensors)})

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as content:
                tensors = {name: content.get_tensor(name) for name in ("keys", "counts", "values")}
                checksum = (content.metadata() or {}).get("checksum")
        except SafetensorError:
            checksum, tensors = None, {}
        if not tensors or checksum != _checksum(tensors):
            logger.warning(f"{file} was altered on the disk, and what it held is computed anew; delete it")
            return
        keys = tensors["keys"].numpy().tobytes()
        values = tensors["values"].split(tensors["counts"].tolist())
        self._values.update((keys[16 * i : 16 * i + 16], value) for i, value in enumerate(values))


def _keys(rows: EncodedBatch) -> list[bytes]:
    """A hash of each row's token ids and of the positions that are read."""
    found = []
    for (ids, other), at in zip(token_ids(rows), rows.positions.cpu(), strict=True):
        places = at.nonzero()[:, 0].tolist()
        found.append(hashlib.blake2b(json.dumps([ids, other, places]).encode(), digest_size=16).digest())
    return found


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().tobytes(), value)
    return str(value)
