"""The token ids of a batch's rows, by which what is kept of a text is found."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..data.encoding import EncodedBatch


def token_ids(rows: EncodedBatch) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each row's token ids without padding: the input's, and the decoder's (empty if there is none)."""
    lengths = rows.inputs["attention_mask"].sum(-1).tolist()
    inputs = rows.inputs["input_ids"].tolist()
    decoder = rows.inputs.get("decoder_input_ids")
    if decoder is None:
        for ids, length in zip(inputs, lengths, strict=True):
            yield ids[:length], []
        return
    ends = (rows.positions.cpu() * torch.arange(1, rows.positions.shape[1] + 1)).amax(-1).tolist()
    for ids, length, other, end in zip(inputs, lengths, decoder.tolist(), ends, strict=True):
        yield ids[:length], other[:end]
