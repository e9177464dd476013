"""Readers of the field's data sets: from a file or a Hub id to [`~hf_mend.EditRecord`]s."""

from .reading import check_targets, read_counterfact, read_edits, read_questions, write_edits


__all__ = ["check_targets", "read_counterfact", "read_edits", "read_questions", "write_edits"]
