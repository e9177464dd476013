"""Measuring edits: metrics, scores, generation, resumed runs and reports."""
