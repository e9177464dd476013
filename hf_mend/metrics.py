"""How good an editor is: edit success, generality and locality, of edits made alone or several together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from .data import EditRecord, Encoder, Query, Rows, batches
from .editing import find_updates, observe_ordinary_text
from .edits import Update, applied, together
from .losses import kl_divergence, row_means
from .methods import EditMethod
from .targets import Target
from .tracing import SplitModel, logits_of


@dataclass
class Measured:
    """
    What was measured on one record; shares are over its own rows, `None` where it has none.

    Args:
        success (`bool`): Every target token is the argmax, teacher-forced, on the prompt.
        generality (`float`, *optional*): Share of paraphrases on which the same holds.
        neighborhood (`float`, *optional*): Share of neighbouring prompts whose greedy next token stays.
        unrelated (`float`, *optional*): Share of unrelated answers' tokens whose greedy prediction stays.
        neighborhood_kl (`float`, *optional*): Mean KL(un-edited || edited) there, nats.
        unrelated_kl (`float`, *optional*): The same on unrelated answers.
        exact_match (`bool`, *optional*): Free greedy decoding from the prompt says the target and then ends the word.
    """

    success: bool
    generality: float | None = None
    neighborhood: float | None = None
    unrelated: float | None = None
    neighborhood_kl: float | None = None
    unrelated_kl: float | None = None
    exact_match: bool | None = None
    rows: dict[str, int] = field(default_factory=dict)


def evaluate_records(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    records: Sequence[EditRecord],
    batch_size: int = 10,
    max_steps: int | None = None,
    edits_together: int = 1,
    generate: bool = False,
    progress: bool = True,
) -> list[Measured]:
    """
    Edits each record and measures it. A batch's edits run side by side, each row under its own edit, or its group's.

    Args:
        split ([`SplitModel`]): The base model.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Factors to updates.
        encoder ([`Encoder`]): Tokenises and pads.
        records (`Sequence[EditRecord]`): The facts.
        batch_size (`int`, defaults to 10): Edits at once.
        max_steps (`int`, *optional*): As for [`~hf_mend.editing.find_updates`]: steps of an edit that does not take.
        edits_together (`int`, defaults to 1): How many neighbouring records' edits, each found on the un-edited model,
            or together by a method that joins them, are applied at once while their rows are measured.
        generate (`bool`, defaults to `False`): Measure `exact_match` too, which costs most of the time.
        progress (`bool`, defaults to `True`): Show a progress bar.
    """
    measured: list[Measured] = []
    if not method.trains and not method.is_calibrated:
        observe_ordinary_text(split, targets, method, encoder)
    with torch.no_grad(), tqdm(total=len(records), desc="Measuring", disable=not progress) as bar:
        for chunk in batches(records, max(1, batch_size // edits_together) * edits_together):
            edits = encoder([Query(record.prompt, record.target) for record in chunk]).to(split.device)
            found = find_updates(split, targets, method, edits, max_steps, edits_together=edits_together)
            updates = together(found.updates, edits_together)
            groups = torch.arange(len(chunk)) // edits_together
            measured += _measure(split, targets, updates, groups, encoder, chunk)
            if generate:
                said_freely = _says_freely(split, targets, _for_rows(updates, groups), encoder, chunk)
                for result, said in zip(measured[-len(chunk) :], said_freely, strict=True):
                    result.exact_match = said
            bar.update(len(chunk))
    return measured


def summarize(measured: Sequence[Measured]) -> dict[str, float]:
    """
    Means over edits for `edit_success` and `exact_match`, over rows for the others, as the field reports them; `score`
    is the mean of success, generality and both localities.
    """
    out = {"edits": float(len(measured)), "edit_success": _mean([float(m.success) for m in measured])}
    for name in ("generality", "neighborhood", "unrelated", "neighborhood_kl", "unrelated_kl"):
        kind = name.removesuffix("_kl")
        pairs = [(getattr(m, name), m.rows.get(kind, 0)) for m in measured if getattr(m, name) is not None]
        count = sum(rows for _, rows in pairs)
        if count:
            out[name] = sum(value * rows for value, rows in pairs) / count
    exact = [float(m.exact_match) for m in measured if m.exact_match is not None]
    if exact:
        out["exact_match"] = _mean(exact)
    scored = [out[name] for name in ("edit_success", "generality", "neighborhood", "unrelated") if name in out]
    out["score"] = _mean(scored)
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _measure(
    split: SplitModel,
    targets: Sequence[Target],
    updates: dict[str, Update],
    groups: torch.Tensor,
    encoder: Encoder,
    records: Sequence[EditRecord],
) -> list[Measured]:
    results = [Measured(False) for _ in records]
    kinds = {
        "success": [[Query(r.prompt, r.target)] for r in records],
        "generality": [[Query(text, r.target) for text in r.paraphrases] for r in records],
        "neighborhood": [[Query(text) for text in r.neighborhood] for r in records],
        "unrelated": [[Query(*pair) for pair in r.unrelated] for r in records],
    }
    for kind, queries in kinds.items():
        owner = torch.tensor([i for i, group in enumerate(queries) for _ in group])
        if len(owner) == 0:
            continue
        rows = encoder([query for group in queries for query in group]).to(split.device)
        state = split.run_below(rows.inputs)
        with applied(targets, _for_rows(updates, groups[owner])):
            edited = logits_of(split, rows, state)
        local = kind in ("neighborhood", "unrelated")
        base = logits_of(split, rows, state) if local else None
        expected = rows.next_tokens[rows.positions] if base is None else base.argmax(-1)
        right = (edited.argmax(-1) == expected).float()
        per_row = row_means(right, rows)
        if base is not None:
            per_row_kl = row_means(kl_divergence(edited, base), rows)
        for i, result in enumerate(results):
            mine = (owner == i).to(per_row.device)
            if not mine.any():
                continue
            result.rows[kind] = int(mine.sum())
            if kind == "success":
                result.success = bool(per_row[mine].item() == 1)
            elif kind == "generality":
                result.generality = float((per_row[mine] == 1).float().mean())
            else:
                setattr(result, kind, float(per_row[mine].mean()))
                setattr(result, kind + "_kl", float(per_row_kl[mine].mean()))
    return results


def _for_rows(updates: dict[str, Update], owner: torch.Tensor) -> dict[str, Update]:
    return {name: (u[owner.to(u.device)], v[owner.to(v.device)]) for name, (u, v) in updates.items()}


def _says_freely(
    split: SplitModel,
    targets: Sequence[Target],
    updates: dict[str, Update],
    encoder: Encoder,
    records: Sequence[EditRecord],
    extra_tokens: int = 3,
) -> list[bool]:
    """Whether greedy decoding from the prompt, free of the target's text, says the target and then ends the word."""
    prompts = [encoder.tokens(Query(record.prompt, record.target)) for record in records]
    said: list[list[int]] = [[] for _ in records]
    steps = max(len(target) for _, target in prompts) + extra_tokens
    with applied(targets, updates):
        for _ in range(steps):
            # The last token stands for the one that comes next: `pad` never puts it in.
            rows: Rows = encoder.pad([(prompt, [*out, 0]) for (prompt, _), out in zip(prompts, said, strict=True)])
            rows.positions = _last_position(rows.positions)
            for out, token in zip(said, logits_of(split, rows.to(split.device)).argmax(-1).tolist(), strict=True):
                out.append(token)
    results = []
    for record, out in zip(records, said, strict=True):
        text = encoder.decode(out)
        rest = text[len(record.target) :]
        results.append(text.startswith(record.target) and not rest[:1].isalnum())
    return results


def _last_position(positions: torch.Tensor) -> torch.Tensor:
    """Each row's last true position alone."""
    width = positions.shape[1]
    last = (positions * torch.arange(width)).max(-1).values
    return torch.arange(width)[None, :] == last[:, None]
