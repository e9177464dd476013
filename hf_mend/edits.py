"""The algebra of edits: low-rank updates of a few layers, applied beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import read_json, shortened
from .targets import Target


Update = tuple[torch.Tensor, torch.Tensor]

_TENSOR_NAME = re.compile(r"(?P<index>0|[1-9][0-9]{0,8})\.(?P<layer>.+)\.(?P<side>[uv])")


@dataclass
class Edit:
    """
    One edit: for each edited layer two thin matrices whose product is added to the weight.

    Args:
        id (`str`): Unique among the edits of a model.
        prompt (`str`): What was asked.
        target (`str`): What the model should answer.
        updates (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes `(rank, d_in)` and
            `(rank, d_out)`; the weight `(d_out, d_in)` changes by `v^T u`.
        metadata (`dict[str, str]`): Whatever else is worth keeping: time, editor, chat.
        enabled (`bool`, defaults to `True`): An edit that is turned off stays among a model's edits, without effect.
        replaces (`list[str]`): Ids of the edits whose sum this one is, which have no effect beside it.
        needs (`str`, *optional*): Id of the support that this edit was found with and acts with.
        support (`bool`, defaults to `False`): This is no edit of a prompt but a change that others need. It acts,
            once, while one of them does.
    """

    id: str
    prompt: str
    target: str
    updates: dict[str, Update]
    metadata: dict[str, str] = field(default_factory=dict)
    enabled: bool = True
    replaces: list[str] = field(default_factory=list)
    needs: str | None = None
    support: bool = False

    @property
    def asked(self) -> tuple[str, bool] | None:
        """What was asked, as [`same_prompt`] tells prompts apart; `None` for an edit without a prompt."""
        return same_prompt(self.prompt, self.metadata.get("chat") == "true") if self.prompt else None

    @property
    def rank(self) -> int:
        """The largest rank among the layers."""
        return max((u.shape[0] for u, _ in self.updates.values()), default=0)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each layer's update, without forming it: `|v^T u|^2 = tr((u u^T)(v v^T))`."""
        return {
            name: float((u.double() @ u.double().T * (v.double() @ v.double().T)).sum().clamp(min=0).sqrt())
            for name, (u, v) in self.updates.items()
        }

    def describe(self) -> dict[str, Any]:
        """Everything but the matrices, as plain JSON values."""
        state: dict[str, Any] = {"enabled": self.enabled}
        state |= {name: value for name in ("replaces", "needs", "support") if (value := getattr(self, name))}
        return {"id": self.id, "prompt": self.prompt, "target": self.target, "metadata": self.metadata, **state}

    @classmethod
    def from_description(cls, described: Mapping[str, Any], updates: dict[str, Update]) -> Edit:
        """The edit that [`describe`] described, which [`is_description`] has checked."""
        texts = (described["id"], described["prompt"], described["target"])
        state = {name: described[name] for name in ("enabled", "replaces", "needs", "support") if name in described}
        return cls(*texts, updates, dict(described["metadata"]), **state)


def same_prompt(prompt: str, chat: bool) -> tuple[str, bool]:
    """What two prompts have in common that are the same one: the text but for white space, and the chat flag."""
    return " ".join(prompt.split()), chat


def active_edits(edits: Sequence[Edit]) -> list[Edit]:
    """
    The edits that act, among those that are not turned off: of one prompt's only the last, which supersedes the others
    while it is there, and none that another replaces; and the supports that these need.
    """
    enabled = [edit for edit in edits if edit.enabled and not edit.support]
    last = {edit.asked: index for index, edit in enumerate(enabled)}
    replaced = {one for edit in enabled for one in edit.replaces}
    acting = [
        edit
        for index, edit in enumerate(enabled)
        if edit.id not in replaced and (edit.asked is None or last[edit.asked] == index)
    ]
    needed = {edit.needs for edit in acting} - replaced
    return [edit for edit in edits if edit.support and edit.id in needed] + acting


def acting_ids(edits: Sequence[Edit]) -> list[str]:
    """Ids of the edits that act; in place of one that replaced others, theirs."""
    return [one for edit in active_edits(edits) for one in (edit.replaces or [edit.id])]


def each_support_once(edits: Sequence[Edit]) -> list[Edit]:
    """The edits, of a support that comes several times the first: two collections may bring the same."""
    first = {edit.id: index for index, edit in reversed([*enumerate(edits)])}
    return [edit for index, edit in enumerate(edits) if not edit.support or first[edit.id] == index]


def check_supported(edits: Sequence[Edit], source: str | Path, among: Sequence[Edit] = ()) -> None:
    """
    Raises:
        ValueError: An edit needs a support that is neither here nor `among` others.
    """
    every = [*edits, *among]
    there = {edit.id for edit in every} | {one for edit in every for one in edit.replaces}
    for edit in edits:
        if edit.needs is not None and edit.needs not in there:
            raise ValueError(
                f"{source}: the edit {edit.id!r} acts with the change {edit.needs!r} beside it, which is missing; "
                "take it along from the edits of the model that made it"
            )


def edits_from_tensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], source: str | Path
) -> list[Edit]:
    """
    Edits from a file's tensors (`<index>.<layer>.u` and `.v`) and its header.

    Raises:
        ValueError: The header is missing or does not fit the tensors; the message names the source.
    """
    described = read_json(metadata.get("edits", "null"), f"the header of {source}")
    broken = f"{source} is not a collection of edits, or its header was altered"
    if not isinstance(described, list) or not all(map(is_description, described)):
        raise ValueError(f"{broken}: {shortened(described)}; write it with save_edits")
    edits = [Edit.from_description(one, {}) for one in described]
    for name, tensor in tensors.items():
        found = _TENSOR_NAME.fullmatch(name)
        other = f"{found['index']}.{found['layer']}.{'v' if found['side'] == 'u' else 'u'}" if found else ""
        if not found or other not in tensors or int(found["index"]) >= len(edits):
            raise ValueError(f"{broken}: it has no pair or no edit for the tensor {name!r}; write it with save_edits")
        if found["side"] == "u":
            edits[int(found["index"])].updates[found["layer"]] = (tensor, tensors[other])
    return edits


def is_description(value: Any) -> bool:
    """Whether a value is what `Edit.describe` gives."""
    if not isinstance(value, dict) or not isinstance(value.get("metadata"), dict):
        return False
    replaces, flags = value.get("replaces", []), (value.get("enabled", True), value.get("support", False))
    if not all(isinstance(flag, bool) for flag in flags) or not isinstance(replaces, list):
        return False
    texts = [*map(value.get, ("id", "prompt", "target")), value.get("needs", ""), *value["metadata"].values()]
    return all(isinstance(text, str) for text in [*texts, *replaces])


def dense(update: Update) -> torch.Tensor:
    """The update as a matrix `(d_out, d_in)`."""
    u, v = update
    return v.T @ u


def as_pair(change: torch.Tensor) -> Update:
    """A change of a weight, `(..., d_out, d_in)`, as a pair of the smaller of the two ranks; what `dense` undoes."""
    d_out, d_in = change.shape[-2:]
    identity = torch.eye(min(d_out, d_in), dtype=change.dtype, device=change.device)
    identity = identity.expand(*change.shape[:-2], -1, -1)
    return (change, identity) if d_out <= d_in else (identity, change.transpose(-1, -2))


def side_path(x: torch.Tensor, update: Update) -> torch.Tensor:
    """
    What an edit adds to a layer's output: `(x u^T) v`.

    Args:
        x (`torch.Tensor` of shape `(..., d_in)`): The layer's input.
        update (`tuple[torch.Tensor, torch.Tensor]`): `(u, v)`, either of shapes `(rank, d_in)` and `(rank, d_out)`,
            the same for all rows, or with a leading dimension of edits: then the rows fall into as many equal runs,
            each with its own edit.

    Returns:
        `torch.Tensor` of shape `(..., d_out)`, in the factors' dtype.
    """
    u, v = update
    h = x.to(u.dtype)
    if u.dim() == 2:
        return (h @ u.T) @ v
    grouped = h.reshape(u.shape[0], -1, h.shape[-1])  # (edits, rows/edits * seq, d_in)
    out = torch.bmm(torch.bmm(grouped, u.transpose(1, 2)), v)
    return out.reshape(*x.shape[:-1], v.shape[-1])


def together(updates: Mapping[str, Update], size: int) -> dict[str, Update]:
    """
    Neighbouring edits summed in groups, as thin matrices side by side.

    Args:
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes
            `(edits, rank, d_in)` and `(edits, rank, d_out)`.
        size (`int`): Edits a group; the last group may have fewer.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: Shapes `(groups, size * rank, d_in)` and
        `(groups, size * rank, d_out)`.
    """
    return {name: (_in_groups(u, size), _in_groups(v, size)) for name, (u, v) in updates.items()}


def apart(updates: Mapping[str, Update], size: int, edits: int) -> dict[str, Update]:
    """The edits that [`together`] put side by side in groups of `size`, each on its own again."""
    return {
        name: (
            u.reshape(-1, u.shape[1] // size, u.shape[2])[:edits],
            v.reshape(-1, v.shape[1] // size, v.shape[2])[:edits],
        )
        for name, (u, v) in updates.items()
    }


def compacted(update: Update) -> Update:
    """The same update, `(rank, d_in)` and `(rank, d_out)`, with a rank of at most the smaller of the two widths."""
    u, v = update
    if u.shape[0] <= min(u.shape[1], v.shape[1]):
        return update
    if v.shape[1] <= u.shape[1]:
        return v.T @ u, torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    return torch.eye(u.shape[1], dtype=u.dtype, device=u.device), u.T @ v


def _in_groups(factors: torch.Tensor, size: int) -> torch.Tensor:
    missing = -factors.shape[0] % size
    if missing:
        factors = torch.cat([factors, factors.new_zeros(missing, *factors.shape[1:])])
    return factors.reshape(-1, size * factors.shape[1], factors.shape[2])


@contextmanager
def applied(targets: Sequence[Target], *updates: Mapping[str, Update]) -> Iterator[None]:
    """
    Within the context, the target layers' outputs carry the updates.

    Args:
        targets (`Sequence[Target]`): The layers.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): See [`side_path`]; layers without one stay as they
            are. Of several mappings all count.
    """
    with ExitStack() as hooks:
        for target in targets:
            for one in updates:
                if target.name in one:
                    hooks.callback(_attach(target.module, one[target.name]).remove)
        yield


def _attach(module: nn.Module, update: Update) -> Any:
    u, v = update

    def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        nonlocal u, v
        if u.device != output.device:
            u, v = u.to(output.device), v.to(output.device)  # an offloaded layer runs elsewhere
        return output + side_path(args[0].to(output.device), (u, v)).to(output.dtype)

    return module.register_forward_hook(add)


def stacked(edits: Sequence[Edit]) -> dict[str, Update]:
    """All edits of a layer as one pair of thin matrices, so that many edits cost one side path."""
    names = {name: None for edit in edits for name in edit.updates}
    pairs = {name: [edit.updates[name] for edit in edits if name in edit.updates] for name in names}
    return {name: (torch.cat([u for u, _ in pair]), torch.cat([v for _, v in pair])) for name, pair in pairs.items()}


def truncated(update: Update, rank: int) -> tuple[Update, float]:
    """
    The nearest update of at most this rank, by singular value decomposition of the thin matrices' product.

    Args:
        update (`tuple[torch.Tensor, torch.Tensor]`): `(u, v)` of shapes `(rows, d_in)` and `(rows, d_out)`.
        rank (`int`): The most rows of the result.

    Returns:
        `tuple`: The update, and the Frobenius norm of what is left out, divided by the whole's.
    """
    u, v = update
    if len(u) <= rank:
        return update, 0.0
    u, v = compacted((u.double(), v.double()))  # past the narrower width, the matrix itself is smaller
    q_in, r_in = torch.linalg.qr(u.T)  # (d_in, rows), (rows, rows)
    q_out, r_out = torch.linalg.qr(v.T)
    left, sizes, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    whole = sizes.square().sum()
    error = float((sizes[rank:].square().sum() / whole).sqrt()) if whole > 0 else 0.0
    thin_u, thin_v = right[:rank] @ q_in.T, (q_out @ (left[:, :rank] * sizes[:rank])).T
    return (thin_u.to(update[0].dtype).contiguous(), thin_v.to(update[1].dtype).contiguous()), error
