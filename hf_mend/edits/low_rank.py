"""The algebra of low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch


Update = tuple[torch.Tensor, torch.Tensor]


def dense(update: Update) -> torch.Tensor:
    """Return the update as a matrix `(d_out, d_in)`."""
    u, v = update
    return v.T @ u


def as_pair(change: torch.Tensor) -> Update:
    """
    Factor a change of a weight, `(..., d_out, d_in)`, into a pair of the smaller of the two ranks; `dense` undoes it.
    """
    d_out, d_in = change.shape[-2:]
    identity = torch.eye(min(d_out, d_in), dtype=change.dtype, device=change.device)
    identity = identity.expand(*change.shape[:-2], -1, -1)
    return (change, identity) if d_out <= d_in else (identity, change.transpose(-1, -2))


def same_pairs(one: Mapping[str, Update], other: Mapping[str, Update]) -> bool:
    """Whether two mappings hold the same tensors, to the bit, wherever they are kept."""
    return one.keys() == other.keys() and all(
        mine.dtype == theirs.dtype and torch.equal(mine, theirs.to(mine.device))
        for name, pair in one.items()
        for mine, theirs in zip(pair, other[name], strict=True)
    )


def side_path(x: torch.Tensor, update: Update) -> torch.Tensor:
    """
    Return an edit's addition to a layer's output: `(x u^T) v`.

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
    Sum neighbouring edits in groups, as thin matrices side by side.

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
    """Separate the edits that [`together`] put side by side in groups of `size`."""
    return {
        name: (
            u.reshape(-1, u.shape[1] // size, u.shape[2])[:edits],
            v.reshape(-1, v.shape[1] // size, v.shape[2])[:edits],
        )
        for name, (u, v) in updates.items()
    }


def compacted(update: Update) -> Update:
    """
    Return the same update, `(rank, d_in)` and `(rank, d_out)`, with a rank of at most the smaller of the two widths.
    """
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


def truncated(update: Update, rank: int) -> tuple[Update, float]:
    """
    Return the nearest update of at most this rank, by singular value decomposition of the thin matrices' product.

    Args:
        update (`tuple[torch.Tensor, torch.Tensor]`): `(u, v)` of shapes `(rows, d_in)` and `(rows, d_out)`.
        rank (`int`): The most rows of the result.

    Returns:
        `tuple`: The update, and the Frobenius norm of the truncated part, divided by the whole's.
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
