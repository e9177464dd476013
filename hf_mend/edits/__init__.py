"""Edits: their low-rank algebra, how they act beside the weights, and how they are kept."""
