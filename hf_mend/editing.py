"""One request's way to an edit: encode, trace, transform, apply, check."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from .data import EditRecord, Encoder, Query, Rows, length_batches
from .edits import Edit, EditStack, Update, applied
from .methods import EditMethod
from .targets import Target
from .tracing import HiddenState, SplitModel, logits_of, trace


# Most tokens in one pass of edits, padding included: what bounds the memory of long requests.
_BATCH_TOKENS = 4096


@dataclass
class EditRequest:
    """What one edit asks for; the fields are those of [`~hf_mend.EditableModel.edit`]."""

    prompt: str
    target: str
    chat: bool = False
    paraphrases: list[str] = field(default_factory=list)
    locality: list[str] = field(default_factory=list)

    @property
    def query(self) -> Query:
        """Prompt and target as the encoder takes them."""
        return Query(self.prompt, self.target, self.chat)


@dataclass
class Probe:
    """A prompt looked at before and after an edit: what the model says there, and whether that is as it should be."""

    prompt: str
    before: str
    after: str
    ok: bool


@dataclass
class EditResult:
    """
    What an edit did.

    Args:
        id (`str`, *optional*): The edit's id; `None` when none was needed.
        prompt (`str`): What was asked.
        target (`str`): What the model should answer.
        before (`str`): The model's answer before: its greedy choice at each of the target's tokens, teacher-forced.
        after (`str`, *optional*): The same after; this and the next two are `None` after `check=False`.
        probability_before (`float`): Probability of the whole target before.
        probability_after (`float`, *optional*): The same after.
        token_success (`list[bool]`, *optional*): For each target token, whether it is the argmax now.
        steps (`int`): Gradient steps that were made; 0 when the model said the target already.
        seconds (`float`): What it took, in seconds; in a batch, an equal share.
        rank (`int`): Rank of the update.
        update_norms (`dict[str, float]`): Frobenius norm of the update of each layer.
        paraphrases (`list[Probe]`): The paraphrases asked for; ok when the target is said there.
        locality (`list[Probe]`): The locality prompts asked for; ok when the greedy next token stayed.
    """

    id: str | None
    prompt: str
    target: str
    before: str
    after: str | None
    probability_before: float
    probability_after: float | None
    token_success: list[bool] | None
    steps: int
    seconds: float
    rank: int = 0
    update_norms: dict[str, float] = field(default_factory=dict)
    paraphrases: list[Probe] = field(default_factory=list)
    locality: list[Probe] = field(default_factory=list)

    @property
    def success(self) -> bool | None:
        """Whether every target token is the argmax now; `None` if nobody looked."""
        return None if self.token_success is None else all(self.token_success)

    @property
    def already_known(self) -> bool:
        """Whether the model said the target before, so that no edit was made."""
        return self.steps == 0

    def __str__(self) -> str:
        if self.already_known:
            state = "already the model's answer, nothing changed"
        else:
            state = {True: "took", False: "DID NOT TAKE", None: "not checked"}[self.success]
        lines = [
            f"Edit {self.id or '(none)'}: {state}",
            f"  {self.prompt!r} -> {self.target!r}",
            f"  before: {self.before!r} (probability of the target {self.probability_before:.3g})",
            f"  cost: {self.seconds:.2f} s, {self.steps} step(s), rank {self.rank} in {len(self.update_norms)} layers",
        ]
        if self.token_success is not None:
            lines.insert(3, f"  after:  {self.after!r} (probability of the target {self.probability_after:.3g})")
            right = sum(self.token_success)
            lines.insert(4, f"  tokens that are now the argmax: {right} of {len(self.token_success)}")
        if self.update_norms:
            norms = ", ".join(f"{name} {norm:.3g}" for name, norm in self.update_norms.items())
            lines.append(f"  update norms: {norms}")
        for title, probes in (("paraphrase", self.paraphrases), ("locality", self.locality)):
            lines += [
                f"  {title} {'ok ' if p.ok else 'BAD'} {p.prompt!r}: {p.before!r} -> {p.after!r}" for p in probes
            ]
        return "\n".join(lines)


def as_requests(
    prompt: Any, target: Any, chat: bool, paraphrases: Sequence[str], locality: Sequence[str]
) -> list[EditRequest]:
    """
    The requests that the arguments of `edit` stand for.

    Raises:
        ValueError: Lists differ in length, or probes come with several edits.
        TypeError: An argument is neither text nor record.
    """
    prompts: list[Any] = [prompt] if isinstance(prompt, (str, EditRecord)) else list(prompt)
    if not prompts:
        raise ValueError("there is no prompt: the list is empty")
    if all(isinstance(item, EditRecord) for item in prompts):
        if target is not None:
            raise ValueError("records hold their targets; leave `target` out")
        return [EditRequest(r.prompt, r.target, chat, list(r.paraphrases), list(r.neighborhood)) for r in prompts]
    targets: list[Any] = [target] if isinstance(target, str) else list(target or [])
    if len(prompts) != len(targets):
        raise ValueError(f"there are {len(prompts)} prompts and {len(targets)} targets; each prompt needs one target")
    for item in [*prompts, *targets]:
        if not isinstance(item, str):
            raise TypeError(f"prompts and targets are strings, or prompts are EditRecords; got {type(item).__name__}")
    if len(prompts) > 1 and (paraphrases or locality):
        raise ValueError(
            f"paraphrases and locality probes go with one edit, got {len(prompts)}; pass EditRecords, which hold "
            "their own"
        )
    return [EditRequest(p, t, chat, list(paraphrases), list(locality)) for p, t in zip(prompts, targets, strict=True)]


def check_requests(requests: Sequence[EditRequest], encoder: Encoder, config: PretrainedConfig) -> None:
    """
    Raises:
        ValueError: A request is empty, tokenises to nothing, is too long, or asks for a chat template that is not
            there.
    """
    longest = getattr(config, "max_position_embeddings", None)
    for number, request in enumerate(requests):
        where = f"request {number}" if len(requests) > 1 else "the request"
        for name, text in (("prompt", request.prompt), ("target", request.target)):
            if not text.strip():
                raise ValueError(f"{where} has an empty {name} ({text!r}); an edit needs both a prompt and a target")
        if request.chat and not getattr(encoder.tokenizer, "chat_template", None):
            raise ValueError(
                "chat=True needs a tokenizer with a chat template; this one has none, so leave chat=False"
            )
        prompt, target = encoder.tokens(request.query)
        if not target or not prompt:
            raise ValueError(f"{where}: {request.target if prompt else request.prompt!r} tokenises to nothing")
        length = max(len(prompt), len(target)) if encoder.is_encoder_decoder else len(prompt) + len(target)
        if longest is not None and length > longest:
            raise ValueError(
                f"{where} has {length} tokens with its target, the model takes {longest}; shorten the prompt "
                f"{request.prompt[:60]!r}..."
            )


@dataclass
class _Asked:
    """What the model says, per row: the target's log-probability, the argmax tokens, and which of them are right."""

    log_probability: list[float]
    tokens: list[list[int]]
    right: list[list[bool]]


@dataclass
class FoundUpdates:
    """
    What a batch of requests comes to.

    Args:
        updates (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes `(rows, rank, d_in)`
            and `(rows, rank, d_out)`.
        before, after: What the model says to the rows without and with them; `after` is `None` without the check.
        steps (`list[int]`): Gradient steps a row took.
    """

    updates: dict[str, Update]
    before: _Asked
    after: _Asked | None
    steps: list[int]


@torch.no_grad()
def find_updates(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    rows: Rows,
    max_steps: int = 1,
    force: bool = True,
    check: bool = True,
) -> FoundUpdates:
    """
    The updates that make a batch of rows say their targets, each row's on its own.

    A row that does not say its target after a step gets another, computed on the model as its first steps left it.

    Args:
        split ([`SplitModel`]): The model, with whatever edits it carries.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Factors to updates.
        rows ([`Rows`]): Prompts and targets, a row a request.
        max_steps (`int`, defaults to 1): The most steps a row may take.
        force (`bool`, defaults to `True`): Take a step also where the model says the target already.
        check (`bool`, defaults to `True`): Ask the edited model; without it there is one step.

    Raises:
        ValueError: A gradient or an update is not finite.
    """
    state = split.run_below(rows.inputs)
    factors, logits = trace(split, targets, rows.inputs, rows.next_tokens, state)
    before = _ask(rows, logits)
    after = before if check else None
    max_steps = max_steps if check else 1
    wanted = torch.tensor([force or not all(right) for right in before.right])
    steps = [0] * len(rows)
    total: dict[str, Update] = {}
    for step in range(max_steps):
        again = wanted
        if step > 0 and after is not None:
            again = wanted & torch.tensor([not all(right) for right in after.right])
        if not again.any():
            break
        if step > 0:
            with applied(targets, total):
                factors, _ = trace(split, targets, rows.inputs, rows.next_tokens, state)
        more = _masked(_finite_updates(method, factors), again)
        total = _joined(total, more) if total else more
        steps = [count + int(one) for count, one in zip(steps, again.tolist(), strict=True)]
        if check:
            after = _ask_under(split, targets, total, rows, state)
    return FoundUpdates(total, before, after, steps)


def make_edits(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    stack: EditStack,
    requests: Sequence[EditRequest],
    max_steps: int = 3,
    batch_size: int = 16,
    force: bool = False,
    check: bool = True,
) -> list[EditResult]:
    """
    Makes the edits of one call and adds them to the stack. All see what the model carried before the call.

    Raises:
        ValueError: A gradient or an update is not finite; the stack is as it was.
    """
    results: dict[int, EditResult] = {}
    edits: dict[int, Edit] = {}
    lengths = [sum(map(len, encoder.tokens(request.query))) for request in requests]
    with tqdm(total=len(requests), desc="Editing", disable=len(requests) <= batch_size) as bar:
        for chosen in length_batches(lengths, batch_size, _BATCH_TOKENS):
            made = _edit_batch(split, targets, method, encoder, [requests[i] for i in chosen], max_steps, force, check)
            for i, (result, edit) in zip(chosen, made, strict=True):
                results[i] = result
                if edit is not None:
                    edits[i] = edit
            bar.update(len(chosen))
    stack.replace([*stack.edits, *(edits[i] for i in sorted(edits))])
    return [results[i] for i in range(len(requests))]


def _edit_batch(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    requests: Sequence[EditRequest],
    max_steps: int,
    force: bool,
    check: bool,
) -> list[tuple[EditResult, Edit | None]]:
    started = time.perf_counter()
    rows = encoder([request.query for request in requests]).to(split.device)
    found = find_updates(split, targets, method, rows, max_steps, force, check)
    before, after, total, steps = found.before, found.after, found.updates, found.steps
    seconds = (time.perf_counter() - started) / len(requests)
    made = []
    for i, request in enumerate(requests):
        edit = _as_edit(request, {name: (u[i], v[i]) for name, (u, v) in total.items()}) if steps[i] else None
        result = EditResult(
            id=edit.id if edit else None,
            prompt=request.prompt,
            target=request.target,
            before=encoder.decode(before.tokens[i]),
            after=encoder.decode(after.tokens[i]) if after else None,
            probability_before=math.exp(before.log_probability[i]),
            probability_after=math.exp(after.log_probability[i]) if after else None,
            token_success=after.right[i] if after else None,
            steps=steps[i],
            seconds=seconds,
            rank=edit.rank if edit else 0,
            update_norms=edit.norms() if edit else {},
        )
        updates = edit.updates if edit else {}
        result.paraphrases = _probe(split, targets, updates, encoder, request.paraphrases, request, says_target=True)
        result.locality = _probe(split, targets, updates, encoder, request.locality, request, says_target=False)
        made.append((result, edit))
    return made


def _finite_updates(method: EditMethod, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
    for name, pair in factors.items():
        _check_finite(name, "gradient", pair)
    with torch.no_grad():
        updates = method(factors)
    for name, pair in updates.items():
        _check_finite(name, "update", pair)
    return updates


def _check_finite(name: str, what: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in pair):
        raise ValueError(
            f"the {what} of layer {name!r} holds NaN or infinity, so nothing was edited; check that the base model's "
            f"own "
            "outputs are finite (a float16 base may overflow: load it in bfloat16)"
        )


def _masked(updates: dict[str, Update], keep: torch.Tensor) -> dict[str, Update]:
    """The updates of some rows, zero for the others."""
    return {name: (u, v * keep.to(v.device)[:, None, None]) for name, (u, v) in updates.items()}


def _joined(first: dict[str, Update], second: dict[str, Update]) -> dict[str, Update]:
    """The sum of two batches of updates."""
    return {
        name: (torch.cat([u, second[name][0]], 1), torch.cat([v, second[name][1]], 1))
        for name, (u, v) in first.items()
    }


def _as_edit(request: EditRequest, updates: dict[str, Update]) -> Edit:
    kept = {}
    for name, (u, v) in updates.items():
        used = (v != 0).any(-1) & (u != 0).any(-1)
        kept[name] = (u[used].contiguous(), v[used].contiguous())
    metadata = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "chat": str(request.chat).lower()}
    return Edit(uuid.uuid4().hex[:12], request.prompt, request.target, kept, metadata)


@torch.no_grad()
def _ask_under(
    split: SplitModel, targets: Sequence[Target], updates: dict[str, Update], rows: Rows, state: HiddenState
) -> _Asked:
    with applied(targets, updates):
        return _ask(rows, logits_of(split, rows, state))


def _ask(rows: Rows, logits: torch.Tensor) -> _Asked:
    labels = rows.next_tokens[rows.positions].to(logits.device)
    said = logits.argmax(-1)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    per_row = rows.positions.sum(-1).tolist()
    right = said == labels
    return _Asked(
        [float(part.sum()) for part in log_probabilities.split(per_row)],
        [part.tolist() for part in said.split(per_row)],
        [part.tolist() for part in right.split(per_row)],
    )


@torch.no_grad()
def _probe(
    split: SplitModel,
    targets: Sequence[Target],
    updates: dict[str, Update],
    encoder: Encoder,
    prompts: Sequence[str],
    request: EditRequest,
    says_target: bool,
) -> list[Probe]:
    if not prompts:
        return []
    answer = request.target if says_target else None
    rows = encoder([Query(prompt, answer, request.chat) for prompt in prompts]).to(split.device)
    state = split.run_below(rows.inputs)
    before = _ask(rows, logits_of(split, rows, state))
    after = _ask_under(split, targets, updates, rows, state)
    probes = []
    for i, prompt in enumerate(prompts):
        ok = all(after.right[i]) if says_target else after.tokens[i] == before.tokens[i]
        probes.append(Probe(prompt, encoder.decode(before.tokens[i]), encoder.decode(after.tokens[i]), ok))
    return probes
