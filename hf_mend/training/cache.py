"""A cache on disk of the hidden states below the lowest edited block, so that training runs only the blocks above."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..bases.readout import narrowed, readout_of
from ..bases.split import HiddenState, SplitModel
from ..bases.targets import block_lists
from ..data.encoding import EncodedBatch, Encoder, Query, length_batches
from ..editing.budget import free_memory
from .token_ids import token_ids
from .unedited import UneditedOutputs


logger = logging.get_logger(__name__)

_FORMAT = 2
_RECORD = struct.Struct("<16sqiiI")  # digest of the token ids, offset in elements, two lengths, checksum of the state

_Place = tuple[int, int, int, int]  # offset in elements, two lengths, checksum


class HiddenStateCache:
    """
    The results of [`~hf_mend.bases.split.SplitModel.run_below`] for many texts, in memory-mapped files.

    The name of a cache's folder is a hash of the cut and the weights below it, so that another model's states are
    never read. The key of a text is its token ids. States are bfloat16 (float16 for a float16 model). They are written
    before their index entry, so that the cache stays usable if the process is killed. Each has a checksum, which is
    compared when the state is first used: one that was altered on the disk is computed anew. Where all of them take no
    more than a quarter of a GPU's free memory, they stay there.

    Args:
        split ([`SplitModel`]): The model and its cut.
        folder (`str` or `Path`): The folder in which the cache's own folder is made.
        limit (`float`, defaults to 20.0): The largest size in gigabytes (10^9 bytes). States beyond it are computed at
            each use.

    Example:

    ```python
    cache = HiddenStateCache(model.split, "~/.cache/states")
    cache.fill(model.encoder, examples.queries(epochs=1))
    state = cache(rows)  # as model.split.state_of(rows), to bfloat16's rounding
    ```
    """

    def __init__(self, split: SplitModel, folder: str | Path, limit: float = 20.0):
        self.split = split
        self.limit = limit
        self.dtype = torch.float16 if split.model.dtype == torch.float16 else torch.bfloat16
        self.folder = Path(folder).expanduser() / _key(split, self.dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unedited: UneditedOutputs | None = None
        self._index: dict[bytes, _Place] = {}
        self._checked: set[bytes] = set()
        self._widths = (0, 0)
        self._states = torch.zeros(0, dtype=self.dtype)
        self._at_hand: torch.Tensor | None = None
        with self._lock():
            self._open()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Return the size of the states in bytes."""
        return self._states.numel() * self._states.element_size()

    def __contains__(self, ids: tuple[Sequence[int], Sequence[int]]) -> bool:
        return _digest(ids) in self._index

    def __call__(self, rows: EncodedBatch) -> HiddenState:
        """
        Return the rows' state at the cut; rows that the cache lacks are computed.

        Args:
            rows ([`EncodedBatch`]): The texts, padded on the right.
        """
        found = [self._place(_digest(ids)) for ids in token_ids(rows)]
        missing = torch.tensor([place is None for place in found])
        if missing.all():
            return self.split.state_of(rows)
        count, device, dtype = len(rows), self.split.device, self.split.model.dtype
        lengths, states = self._padded_lengths(rows), self._states_for(device)
        hidden, encoder = (
            torch.zeros(count, length, width, dtype=self.dtype, device=states.device)
            for length, width in zip(lengths, self._widths, strict=True)
        )
        for i, place in enumerate(found):
            if place is not None:
                self._read(place, states, hidden[i], encoder[i])
        hidden, encoder = hidden.to(device, dtype), encoder.to(device, dtype)
        if missing.any():
            state = self.split.state_of(rows[missing])
            hidden[missing.to(device)] = state.hidden.to(device)
            if state.encoder is not None:
                encoder[missing.to(device)] = state.encoder.to(device)
        return HiddenState(hidden, encoder if self._widths[1] else None)

    def fill(
        self, encoder: Encoder, queries: Iterable[Query], batch_tokens: int = 2048, progress: bool = True
    ) -> None:
        """
        Compute and store the states of texts that the cache lacks.

        Args:
            encoder ([`Encoder`]): The encoder of the texts.
            queries (`Iterable[Query]`): The texts, in which repetitions are allowed.
            batch_tokens (`int`, defaults to 2048): Tokens per forward pass.
            progress (`bool`, defaults to `True`): Show a progress bar.
        """
        self.fill_tokens(encoder, [encoder.tokens(query) for query in set(queries)], batch_tokens, progress)

    def fill_tokens(
        self,
        encoder: Encoder,
        pairs: Sequence[tuple[list[int], list[int]]],
        batch_tokens: int = 2048,
        progress: bool = True,
    ) -> None:
        """
        Compute and store the states of texts that the cache lacks, given as token ids.

        Args:
            encoder ([`Encoder`]): Pads.
            pairs (`Sequence[tuple[list[int], list[int]]]`): The ids of each text's prompt and answer.
            batch_tokens, progress: As for [`fill`].
        """
        if not pairs:
            return
        state = self.split.run_below(encoder.pad(pairs[:1]).to(self.split.device).inputs)
        self._widths = (state.hidden.shape[-1], 0 if state.encoder is None else state.encoder.shape[-1])
        lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
        estimate = sum(lengths) * max(self._widths) * self.dtype.itemsize / 1e9
        logger.info(
            f"hidden states of {len(pairs)} texts take up to {estimate:.2f} GB; {len(self)} are in {self.folder}"
        )
        if estimate > self.limit:
            logger.warning(
                f"hidden states of all texts would take {estimate:.2f} GB, the limit is {self.limit:.2f} GB: what "
                "goes beyond it is computed at each use. Raise the limit if the disk has room"
            )
        with self._lock(), tqdm(total=len(pairs), desc="Hidden states", disable=not progress) as bar:
            self._open()
            with open(self.folder / "states.bin", "ab") as states, open(self.folder / "index.bin", "ab") as index:
                for chunk in length_batches(lengths, len(pairs), batch_tokens):
                    if not self._append(encoder.pad([pairs[i] for i in chunk]), states, index):
                        break
                    bar.update(len(chunk))
            self._open()

    def fill_unedited(self, encoder: Encoder, queries: Iterable[Query], progress: bool = True) -> None:
        """
        Keep what the un-edited model says at texts' positions, beside their hidden states: where nothing may change, a
        step compares with it. A model whose logits are no plain projection keeps nothing.

        Args:
            encoder ([`Encoder`]): The encoder of the texts.
            queries (`Iterable[Query]`): The texts, in which repetitions are allowed.
            progress (`bool`, defaults to `True`): Show a progress bar.
        """
        texts = list(dict.fromkeys(queries))
        if not texts:
            return
        readout = readout_of(self.split, encoder(texts[:1]).to(self.split.device), self)
        if readout.head is None:
            return

        @torch.no_grad()
        def read(rows: EncodedBatch) -> torch.Tensor:
            rows = rows.to(self.split.device)
            with narrowed(readout.mlp, rows):
                return readout.at(rows, self(rows))

        with self._lock():
            folder = self.folder / f"unedited-{_key(self.split, torch.float32, whole=True)}"
            self._unedited = UneditedOutputs(folder, self.limit * 1e9 - self.nbytes)
            self._unedited.fill(encoder, texts, read, progress=progress)

    def unedited(self, rows: EncodedBatch) -> torch.Tensor | None:
        """Return what the un-edited model says at the rows' positions, `None` where that is not kept of all."""
        return None if self._unedited is None else self._unedited(rows)

    # ---- files ----

    def _append(self, rows: EncodedBatch, states: Any, index: Any) -> bool:
        """Append the rows that are new, and return whether there was room for all."""
        seen: set[bytes] = set()
        new: list[tuple[int, bytes]] = []
        for i, ids in enumerate(token_ids(rows)):
            digest = _digest(ids)
            if digest not in self._index and digest not in seen:
                seen.add(digest)
                new.append((i, digest))
        if not new:
            return True
        rows = rows[torch.tensor([i for i, _ in new])].to(self.split.device)
        state = self.split.state_of(rows)
        records = []
        offset = states.tell() // self.dtype.itemsize
        for i, ids in enumerate(token_ids(rows)):
            parts = self._parts(state, i, ids)
            size = sum(part.numel() for part in parts)
            if (offset + size) * self.dtype.itemsize > self.limit * 1e9:
                break
            lengths = [part.shape[0] for part in parts] + [0] * (2 - len(parts))
            records.append((new[i][1], offset, *lengths))
            content = _to_bytes(torch.cat([part.reshape(-1) for part in parts]))
            records[-1] = (*records[-1], zlib.crc32(content))
            states.write(content)
            offset += size
        states.flush()
        index.write(b"".join(_RECORD.pack(*record) for record in records))
        index.flush()
        self._index.update({record[0]: record[1:] for record in records})
        return len(records) == len(new)

    def _parts(self, state: HiddenState, row: int, ids: tuple[list[int], list[int]]) -> list[torch.Tensor]:
        """Return the row's states without padding: those at the cut, then the encoder's output if there is one."""
        first = len(ids[1]) if self.split.cuts_decoder_of_two else len(ids[0])
        parts = [state.hidden[row, :first]]
        if state.encoder is not None:
            parts.append(state.encoder[row, : len(ids[0])])
        return [part.to("cpu", self.dtype) for part in parts]

    def _padded_lengths(self, rows: EncodedBatch) -> tuple[int, int]:
        source = rows.inputs["input_ids"].shape[1]
        if self.split.cuts_decoder_of_two:
            return rows.inputs["decoder_input_ids"].shape[1], source
        return source, 0

    def _place(self, digest: bytes) -> _Place | None:
        """Return the place of a state that is as it was written."""
        place = self._index.get(digest)
        if place is None or digest in self._checked:
            return place
        offset, first, second, checksum = place
        state = self._states[offset : offset + first * self._widths[0] + second * self._widths[1]]
        if zlib.crc32(_to_bytes(state)) != checksum:
            logger.warning(
                f"a hidden state in {self.folder} was altered on the disk and is computed anew; delete that folder"
            )
            del self._index[digest]
            return None
        self._checked.add(digest)
        return place

    def _states_for(self, device: torch.device) -> torch.Tensor:
        """Return all states, in a GPU's own memory where they fit there."""
        if self._at_hand is None:
            fits = device.type != "cpu" and may_stay(self.nbytes, free_memory(device))
            self._at_hand = self._states.to(device) if fits else self._states
        return self._at_hand

    def _read(self, place: _Place, states: torch.Tensor, hidden: torch.Tensor, encoder: torch.Tensor) -> None:
        offset, first, second, _ = place
        middle = offset + first * self._widths[0]
        hidden[:first] = states[offset:middle].view(first, self._widths[0])
        if second:
            end = middle + second * self._widths[1]
            encoder[:second] = states[middle:end].view(second, self._widths[1])

    def _open(self) -> None:
        """Read the index and map the states; truncate what an interrupted process left beyond the index."""
        settings, states, index = (self.folder / name for name in ("cache.json", "states.bin", "index.bin"))
        if self._widths[0] and not settings.exists():
            written = settings.with_suffix(".new")
            written.write_text(json.dumps({"widths": self._widths}), encoding="utf-8")
            os.replace(written, settings)
        if not settings.exists():
            return
        self._widths = tuple(json.loads(settings.read_text(encoding="utf-8"))["widths"])
        states.touch()
        index.touch()
        itemsize = self.dtype.itemsize
        available = states.stat().st_size // itemsize
        content = index.read_bytes()
        self._index, end, kept = {}, 0, 0
        for digest, offset, first, second, checksum in _RECORD.iter_unpack(
            content[: len(content) // _RECORD.size * _RECORD.size]
        ):
            stop = offset + first * self._widths[0] + second * self._widths[1]
            if offset != end or stop > available:
                break
            self._index[digest] = (offset, first, second, checksum)
            end, kept = stop, kept + 1
        for path, size in ((index, kept * _RECORD.size), (states, end * itemsize)):
            if path.stat().st_size != size:
                with open(path, "r+b") as file:
                    file.truncate(size)
        self._states, self._at_hand = torch.zeros(0, dtype=self.dtype), None
        if end:
            self._states = torch.from_file(str(states), shared=True, size=end, dtype=self.dtype)

    def _lock(self) -> FileLock:
        return FileLock(self.folder / "lock")


def may_stay(nbytes: int, free: int | None) -> bool:
    """
    Whether the states may stay in a GPU's memory, which training needs too.

    Args:
        nbytes (`int`): Their bytes.
        free (`int`, *optional*): The bytes that are free there; `None` where nobody knows.
    """
    return free is not None and nbytes <= _SHARE * free


# Of a GPU's free memory, what states may take.
_SHARE = 0.25


def _digest(ids: tuple[Sequence[int], Sequence[int]]) -> bytes:
    return hashlib.blake2b(json.dumps([list(part) for part in ids]).encode(), digest_size=16).digest()


def _to_bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.int16).numpy().tobytes()


def _key(split: SplitModel, dtype: torch.dtype, whole: bool = False) -> str:
    """
    Return a hash of architecture, configuration, cut, weights below it and dtype, on which the states depend, or of
    all weights.
    """
    model: nn.Module = split.model
    above = {id(p) for block in split.blocks[split.block :] for p in block.parameters()} if not whole else set()
    if not whole and not split.cuts_decoder_of_two:  # with a cut in the encoder, the whole decoder is above it
        for block_list in block_lists(model):
            if block_list.blocks is not split.blocks:
                above |= {id(p) for block in block_list.blocks for p in block.parameters()}
    digest = hashlib.sha256(
        json.dumps(
            [_FORMAT, type(model).__name__, split.model.config.to_json_string(), split.block, str(dtype)]
        ).encode()
    )
    for name, weight in model.named_parameters():
        if id(weight) in above:
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta:  # an offloaded weight is represented by its model's name
            digest.update(str(split.model.config.name_or_path).encode())
        else:
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
