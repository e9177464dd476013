"""What the encoder-decoder benchmark measures of edits that are kept together, on a tiny model."""

from __future__ import annotations

import importlib
import sys

from support.models import RECORDS, build_model, make_tokenizer
from support.paths import ROOT
from support.scope import scoped


BENCHMARKS = ROOT / "benchmarks"


def test_edits_of_an_encoder_decoder_model_are_asked_together(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    seq2seq, kept = importlib.import_module("seq2seq"), importlib.import_module("seq2seq_kept")
    model = scoped(build_model("t5"), make_tokenizer(), edit_lr=5.0)
    others = [("the river of kenya is", "tana"), ("the far north has", "snow")]
    texts = kept.asked(RECORDS[:4], others, seed=0)
    assert all(one["behind text"][0].endswith(one["paraphrase"][0]) for one in texts)

    def answers(prompts):
        return seq2seq.answers_of(model, model.encoder, prompts, 4) if prompts else []

    found = {str(count): kept.kept_together(model, RECORDS[:4], texts, count, answers) for count in (1, 4)}
    assert not model.edits
    for shares in found.values():  # a strict scope: nothing but the edits' own prompts is under an edit
        assert shares["unrelated"] == shares["unrelated, bit for bit"] == 1.0 and 0 <= shares["prompt"] <= 1
    assert kept.kept_table(found).startswith("| kept | prompt | paraphrase | behind text |")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)
