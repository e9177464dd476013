"""Many small tensors as few large ones: a GPU waits for each call, and the host for each value that it asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch


Pair = tuple[torch.Tensor, torch.Tensor]


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Return tensors of one shape as one tensor, `(tensors, ...)`: without a copy where they are the parts of such a
    tensor, in order.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    whole = first._base
    if (
        whole is not None
        and whole.dim() == first.dim() + 1
        and len(whole) == len(tensors)
        and all(
            one._base is whole
            and one.shape == whole.shape[1:]
            and one.dtype == whole.dtype
            and one.stride() == whole.stride()[1:]
            and one.storage_offset() == whole.storage_offset() + i * whole.stride(0)
            for i, one in enumerate(tensors)
        )
    ):
        return whole
    return torch.stack(list(tensors))


def of_one_shape(pairs: Mapping[str, Pair]) -> list[list[str]]:
    """Return the names of the pairs in groups: within a group shapes, dtypes and devices are the same."""
    groups: dict[object, list[str]] = {}
    for name, pair in pairs.items():
        key = tuple((side.shape, side.dtype, side.device) for side in pair)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def largest(pairs: Mapping[str, Pair]) -> torch.Tensor:
    """
    Return the largest absolute values among the pairs of each shape, `(sides,)`: one is NaN or infinite where any
    value is. Nothing waits for them.
    """
    found = []
    for names in of_one_shape(pairs):
        for side in (0, 1):
            values = stacked([pairs[name][side] for name in names])
            if values.numel():
                found.append(torch.linalg.vector_norm(values, torch.inf, dtype=torch.float32))
    if not found:
        return torch.zeros(1)
    device = found[0].device
    return torch.stack([one if one.device == device else one.to(device) for one in found])


def fetched(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """
    Return tensors in the host's memory, in one transfer a device: the host waits once for all of them.

    Args:
        tensors (`Iterable[torch.Tensor]`): Tensors of any dtypes.
    """
    wanted = [one.detach() for one in tensors]
    of_device: dict[torch.device, list[int]] = {}
    for number, one in enumerate(wanted):
        of_device.setdefault(one.device, []).append(number)
    found: dict[int, torch.Tensor] = {}
    for numbers in of_device.values():
        # The widest values first, so that each lies where its dtype may be read.
        numbers = sorted(numbers, key=lambda number: -wanted[number].element_size())
        packed = torch.cat([wanted[number].reshape(-1).view(torch.uint8) for number in numbers]).cpu()
        parts = packed.split([wanted[number].numel() * wanted[number].element_size() for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            found[number] = part.view(wanted[number].dtype).reshape(wanted[number].shape)
    return [found[number] for number in range(len(wanted))]
