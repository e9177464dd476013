"""Edits: their low-rank algebra, the hook by which they act beside the weights, and their files."""
