"""The merge of edits that are made together: one ridge regression a layer, in the smaller of its two dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class SecondMoment:
    """
    The second moment of a layer's inputs on calibration text, `M = E[x x^T] + ridge`, as its leading eigenvectors and
    one eigenvalue for all others, so that it stays small.

    Args:
        basis (`torch.Tensor` of shape `(d_in, rank)`): The eigenvectors.
        shrink (`torch.Tensor` of shape `(rank,)`): `1 - other / eigenvalue` of each.
        scale (`torch.Tensor` of shape `()`): `1 / other`.
        widths (`torch.Tensor` of shape `(d_in,)`, *optional*): The eigenvectors are those of `x / widths`; M is that
            of `x`.
    """

    basis: torch.Tensor
    shrink: torch.Tensor
    scale: torch.Tensor
    widths: torch.Tensor | None = None

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """Return `M^-1 x` for each row of `x`, `(..., d_in)`."""
        if self.widths is not None:
            x = x / self.widths
        x = (x - (x @ self.basis * self.shrink) @ self.basis.T) * self.scale
        return x if self.widths is None else x / self.widths

    def direction(self, x: torch.Tensor) -> torch.Tensor:
        """
        Return `M^-1 x / (x^T M^-1 x)` for each row of `x`, `(..., d_in)`: 1 at `x`, least on calibration text, 0 for
        0.
        """
        found = self.solve(x.to(self.scale.device)).to(x.device)
        return found / (x * found).sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)

    def matrix(self) -> torch.Tensor:
        """Return M itself, `(d_in, d_in)`."""
        identity = torch.eye(self.basis.shape[0], dtype=self.basis.dtype, device=self.basis.device)
        stretch = self.shrink / (1 - self.shrink)
        matrix = (identity + (self.basis * stretch) @ self.basis.T) / self.scale
        return matrix if self.widths is None else matrix * self.widths[:, None] * self.widths

    def to(self, dtype: torch.dtype) -> SecondMoment:
        """Return the same second moment in a dtype."""
        widths = None if self.widths is None else self.widths.to(dtype)
        return SecondMoment(self.basis.to(dtype), self.shrink.to(dtype), self.scale.to(dtype), widths)


def leading_eigenvectors(moment: torch.Tensor, rank: int, ridge: float) -> SecondMoment:
    """
    Cut a second moment to its leading eigenvectors.

    Args:
        moment (`torch.Tensor` of shape `(d_in, d_in)`): Mean of `x x^T`.
        rank (`int`): The number of eigenvectors.
        ridge (`float`): The value added to the diagonal, as a share of its mean.
    """
    values, vectors = torch.linalg.eigh(moment)
    rest, leading = values[:-rank], values[-rank:]
    added = ridge * values.mean()
    other = (rest.mean() if len(rest) else leading.min()) + added
    return SecondMoment(vectors[:, -rank:], 1 - other / (leading + added), 1 / other)


def ridge_keys(
    x: torch.Tensor,
    strength: torch.Tensor | float,
    moment: SecondMoment | None = None,
    preserved_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return the keys with which the value residuals wanted at some inputs become one update that does best at all of
    them: with `dW = sum_t d_t u_t^T`, the least `sum_t |dW x_t - d_t|^2 + strength * tr(dW M dW^T)` over all `dW`
    (ridge regression; Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", equation 5, with
    `M` the identity; Meng et al. 2023, "Mass-Editing Memory in a Transformer", with inputs on calibration text).

    Each input keeps a key of its own, so that an edit of several made together is still a pair of thin matrices.

    Args:
        x (`torch.Tensor` of shape `(..., tokens, d_in)`): Inputs; zero where there is none.
        strength (`float` or `torch.Tensor`): The ridge's strength: the number of calibration tokens it stands for.
        moment ([`SecondMoment`], *optional*): M; the identity when missing.
        preserved_keys (`torch.Tensor` of shape `(rows, d_in)`, *optional*): Inputs at which the layer's output is to
            stay, such as those of earlier edits: further terms of the sum, with a residual of zero.

    Returns:
        `torch.Tensor` of the shape of `x`: `u = (X^T X + strength M)^-1 x`.
    """
    if preserved_keys is not None and len(preserved_keys):
        every = torch.cat([preserved_keys.expand(*x.shape[:-2], *preserved_keys.shape), x], -2)
        return ridge_keys(every, strength, moment)[..., len(preserved_keys) :, :]
    tokens, width = x.shape[-2:]
    inputs = x.double()
    exact = None if moment is None else moment.to(torch.float64)
    if tokens <= width:
        solved = inputs if exact is None else exact.solve(inputs)
        gram = inputs @ solved.transpose(-1, -2)
        gram = gram + strength * torch.eye(tokens, dtype=gram.dtype, device=gram.device)
        keys = torch.cholesky_solve(solved, torch.linalg.cholesky(gram))
    else:
        penalty = torch.eye(width, dtype=inputs.dtype, device=x.device) if exact is None else exact.matrix()
        gram = inputs.transpose(-1, -2) @ inputs + strength * penalty
        keys = torch.cholesky_solve(inputs.transpose(-1, -2), torch.linalg.cholesky(gram)).transpose(-1, -2)
    return keys.to(x.dtype)
