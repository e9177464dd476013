"""What a text has to reach beyond an edit's threshold: because of rivals, or of what it names in another's place."""

from __future__ import annotations

import torch


# An edit that says something else and is nearly as near to a text speaks against both: where many facts of a kind are
# edited, a neighbour that none is about is about as near to several of them. The nearest rival counts from as far
# below its threshold on as a perfect score is above it, and a share of what it has above that is added to what the
# best has to reach: the larger, the more the words that matter in the text and in the edit's differ, the subject's
# name above all, and the more rivals are at most a part of that room short of acting. It is no more than most of what
# a perfect score has left.
RIVAL_MISSING, RIVAL_MANY, RIVAL_NEAR, RIVAL_MOST = 0.5, 0.2, 0.25, 0.8

# A text that names something else in the place of what an edit's own names ("Portugal" for "France") has more to
# reach, whether there are rivals or not: from this share of its words on, and all of it from that share on, so much of
# what a perfect score has left.
OTHER_FROM, OTHER_TO, OTHER_MOST = 0.4, 0.8, 0.8

# All of it is measured by what a perfect score has left, and by no more than this: a scope that has learned nothing of
# its user's kinds of facts has low thresholds, beneath which nearly everything would be a rival.
MOST_ROOM = 0.24


def room_above(threshold: torch.Tensor) -> torch.Tensor:
    """Return how far a perfect score is above a threshold, as far as that counts."""
    return (1.0 - threshold).clamp(0.0, MOST_ROOM)


def penalty_of(
    rival: torch.Tensor, threshold: torch.Tensor, missing: torch.Tensor, other: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """
    Return what is added to an edit's threshold: because of its rivals ([`rival_penalty`]), or because the text names
    something else ([`other_penalty`]), whichever is more.

    Args:
        rival, threshold, missing, count: As for [`rival_penalty`].
        other: As for [`other_penalty`].
    """
    return torch.maximum(rival_penalty(rival, threshold, missing, count), other_penalty(threshold, other))


def other_penalty(threshold: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """
    Return what is added to an edit's threshold because a text names something else.

    Args:
        threshold (`torch.Tensor`): The edit's.
        other (`torch.Tensor` of the same shape): How far it does ([`~hf_mend.scope.network.other_words`]).
    """
    share = ((other - OTHER_FROM) / (OTHER_TO - OTHER_FROM)).clamp(0.0, 1.0)
    return OTHER_MOST * share * room_above(threshold)


def rival_penalty(
    rival: torch.Tensor, threshold: torch.Tensor, missing: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """
    Return what is added to an edit's threshold because of its rivals.

    Args:
        rival (`torch.Tensor`): How far the text is past the nearest rival's threshold, or short of it.
        threshold (`torch.Tensor` of the same shape): The edit's.
        missing (`torch.Tensor` of the same shape): How much the words of the edit and of the text differ
            ([`~hf_mend.scope.network.missing_words`]).
        count (`torch.Tensor` of the same shape): How many of the rivals' keys are near ([`least_near`]).
    """
    room = room_above(threshold)
    share = RIVAL_MISSING * missing * (1.0 + RIVAL_MANY * (1.0 + count).log2())
    return torch.minimum(share * (rival + room).clamp(min=0.0), RIVAL_MOST * room)


def least_near(threshold: torch.Tensor) -> torch.Tensor:
    """Return how far past a rival key's threshold, or short of it, a text has to be for the key to count as near."""
    return -RIVAL_NEAR * room_above(threshold)
