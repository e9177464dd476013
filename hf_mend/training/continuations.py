"""What the un-edited model says behind a text: the tokens at which the edited one is held to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..bases.limits import longest_input
from ..bases.weights import device_of
from ..data.encoding import Encoder, Query, length_batches
from .examples import TrainingExamples


def with_continuations(  # what is drawn, by whom it is continued, and how: each a choice of its own
    examples: TrainingExamples,
    model: Any,
    epochs: int = 1,
    tokens: int = 8,
    *,
    kinds: Sequence[str] = ("continuation",),
    indices: Iterable[tuple[int, int]] | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> TrainingExamples:
    """
    Lets the un-edited model go on, greedily, behind the texts that the draws of some epochs give, and keeps that in
    `examples.continuations`. What is known already is not computed again, and texts that leave no room are left out.

    Behind prompt and target, the edited model is then held to the un-edited one token by token, so that it stops or
    goes on as that would. Without this function, other text stands behind the target in its place.

    Args:
        examples ([`TrainingExamples`]): The draws.
        model ([`~hf_mend.EditableModel`]): The model; it has a tokenizer, and no edits.
        epochs (`int`, defaults to 1): Of how many epochs the texts are continued.
        tokens (`int`, defaults to 8): At most how many tokens; fewer where the model ends its answer.
        kinds (`Sequence[str]`): The kinds of texts: `"continuation"`, `"neighborhood"`, `"same_subject"`.
        indices (`Iterable[tuple[int, int]]`, *optional*): Numbers of epochs and records, in place of all records of
            `epochs` epochs.
        file (`str` or `Path`, *optional*): JSON lines in which the continuations are kept, for a run that is resumed.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`TrainingExamples`]: The same object.
    """
    known = examples.continuations
    keys = {} if file is None else _read(Path(file))
    order = indices if indices is not None else ((e, i) for e in range(epochs) for i in range(len(examples)))
    wanted: dict[Query, None] = {}
    for epoch, index in order:
        local = examples.texts(index, epoch).local
        wanted.update(dict.fromkeys(query for kind in kinds for query in local[kind] if query not in known))
    encoder: Encoder = model.encoder
    longest = longest_input(model.base_model.config)
    missing: list[Query] = []
    pairs: list[tuple[list[int], list[int]]] = []
    for query in wanted:
        if (kept := keys.get(_key(query))) is not None:
            known[query] = kept
            continue
        pair = encoder.tokens(replace(query, after=() if query.after is not None else None))
        length = max(map(len, pair)) if encoder.is_encoder_decoder else sum(map(len, pair))
        if longest is None or length + tokens <= longest:
            missing.append(query)
            pairs.append(pair)
    bar = tqdm(total=len(missing), desc="Continuations", disable=not progress)
    for chunk in length_batches([len(prompt) + len(answer) for prompt, answer in pairs], 64, 4096):
        said = _greedy(model.base_model, encoder, [pairs[i] for i in chunk], tokens)
        found = {missing[i]: ids for i, ids in zip(chunk, said, strict=True)}
        known.update(found)
        if file is not None:
            _append(Path(file), found)
        bar.update(len(chunk))
    bar.close()
    return examples


@torch.no_grad()
def _greedy(
    model: nn.Module, encoder: Encoder, pairs: Sequence[tuple[list[int], list[int]]], tokens: int
) -> list[tuple[int, ...]]:
    """The model's next tokens behind each text, up to the end of its answer, which is one of them."""
    base: Any = model
    device = device_of(base.get_input_embeddings())  # an offloaded weight's own is `meta`
    given: dict[str, torch.Tensor] = {}
    if encoder.is_encoder_decoder:
        # The answers' lengths may differ, and a decoder is not padded on the left: one at a time where they do.
        starts = [encoder.decoder_prefix + answer[:-1] for _, answer in pairs]
        if len({len(start) for start in starts}) > 1:
            return [said for pair in pairs for said in _greedy(model, encoder, [pair], tokens)]
        given["decoder_input_ids"] = torch.tensor(starts, device=device)
    width = max(len(prompt) for prompt, _ in pairs)
    ids = torch.full((len(pairs), width), encoder.pad_token_id, device=device)  # (rows, seq), padded on the left
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(pairs):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    # One process generates while the others wait, also where the weights are going to be sharded: see EditorTrainer.
    out = base.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, num_beams=1,
        pad_token_id=encoder.pad_token_id, synced_gpus=False, **given,
    )  # fmt: skip
    begun = given["decoder_input_ids"].shape[1] if given else width
    ends = base.generation_config.eos_token_id
    return [_to_end(row, ends if isinstance(ends, list) else [ends]) for row in out[:, begun:].tolist()]


def _to_end(ids: list[int], ends: Sequence[int | None]) -> tuple[int, ...]:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])


def _key(query: Query) -> str:
    named = [query.prompt, query.answer, query.chat, query.context, query.turns, query.system, query.after]
    return json.dumps([*named, *(["ends"] if query.ends else [])])


def _read(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        return {}
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            key, ids = json.loads(line)
        except ValueError:  # a line that an interrupted run left unfinished
            continue
        kept[key] = tuple(ids)
    return kept


def _append(path: Path, found: dict[Query, tuple[int, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for query, ids in found.items():
            file.write(json.dumps([_key(query), list(ids)]) + "\n")
        file.flush()
        os.fsync(file.fileno())
