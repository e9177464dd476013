"""
What the training of SmolLM2-135M-Instruct's editor never sees, and the facts that it does: relations, of each other
relation's templates the last question and the last prompt about the same subject, the last of the packaged texts; and
of what subjects are asked for by rule, the kinds that `hf_mend.data.kinds.FactKinds.split` holds out.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from hf_mend import EditRecord, read_counterfact
from hf_mend.data.forms import FormTemplates, packaged_texts, with_forms


EXAMPLES = Path(__file__).parent.parent / "examples" / "data"
HELD_OUT = "P27,P106,P178,iata_city,language_script,country_currency,city_us_state,airport_country"
HELD_OUT_TEXTS = 40


def training_records(arguments: argparse.Namespace, held_out: list[str]) -> list[EditRecord]:
    """The facts of both folders in a random order, with the forms of asking that training may see."""
    packaged = FormTemplates.load().split()[0].relations
    templates = FormTemplates({name: forms for name, forms in packaged.items() if name not in held_out})
    facts = [
        record
        for folder in (arguments.data, arguments.examples)
        for record in read_counterfact(folder / "facts_train.json")
        if record.relation not in held_out
    ]
    draw = random.Random(arguments.seed)
    draw.shuffle(facts)
    return with_forms(facts[: arguments.facts], templates)


def context_texts() -> list[str]:
    """The packaged texts that training may see."""
    return packaged_texts()[:-HELD_OUT_TEXTS]
