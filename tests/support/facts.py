"""Facts written as files."""

from __future__ import annotations

import json
from pathlib import Path

from support.models import RECORDS


def write_facts(path: Path, count: int = len(RECORDS)) -> Path:
    """The records in CounterFact's layout."""
    rows = [
        {
            "case_id": number,
            "requested_rewrite": {"prompt": "{}", "subject": r.prompt, "target_new": {"str": r.target}},
            "paraphrase_prompts": r.paraphrases,
            "neighborhood_prompts": r.neighborhood,
        }
        for number, r in enumerate(RECORDS[:count])
    ]
    path.write_text(json.dumps(rows))
    return path
