"""What the host knows of a batch, against what the batch's own masks say."""

from __future__ import annotations

import torch
from support.models import RECORDS

from hf_mend.data.encoding import IGNORE, EncodedBatch, Encoder, Query


def queries() -> list[Query]:
    return [Query(record.prompt, record.target) for record in RECORDS]


def check(rows: EncodedBatch) -> None:
    places, values = rows.places, torch.randn(*rows.positions.shape, 3)
    assert torch.equal(places.at(values), values[rows.positions])
    labels = rows.next_tokens[rows.positions]
    assert torch.equal(places.labels, labels.clamp(min=0))
    assert [label for said in places.said for label in said] == labels.tolist()
    assert places.counts == rows.positions.sum(-1).tolist() == [len(said) for said in places.said]
    mask = rows.inputs["attention_mask"].bool()
    read = torch.arange(mask.numel()) if places.read is None else places.read
    assert torch.equal(read, mask.reshape(-1).nonzero()[:, 0])


def test_places_are_where_the_masks_are(tokenizer):
    encoder = Encoder(tokenizer)
    rows = encoder(queries())
    check(rows)
    check(rows.to("cpu"))
    check(rows[torch.tensor([3, 0])])
    check(rows[1:4])
    assert rows.places.pads_right and rows.places.read is not None
    alone = encoder(queries()[:1])
    check(alone)
    assert alone.places.pads_right and alone.places.read is None, "all of its tokens are read"


def test_positions_without_a_token_to_say_are_places_too(tokenizer):
    rows = Encoder(tokenizer)([Query(record.prompt) for record in RECORDS])
    check(rows)
    assert all(said == [IGNORE] for said in rows.places.said)


def test_padding_before_a_text_is_not_on_the_right(tokenizer):
    rows = Encoder(tokenizer)(queries())
    inputs = {name: value.flip(-1) for name, value in rows.inputs.items()}
    left = EncodedBatch(inputs, rows.next_tokens.flip(-1), rows.positions.flip(-1))
    check(left)
    assert not left.places.pads_right


def test_an_encoder_s_tokens_and_a_decoder_s_are_not_counted_together(tokenizer):
    rows = Encoder(tokenizer, True, 0)(queries())
    assert rows.places.read is None and not rows.places.pads_right
    assert torch.equal(rows.places.at(rows.next_tokens), rows.next_tokens[rows.positions])


def test_a_text_is_tokenised_once(tokenizer, monkeypatch):
    texts = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **kwargs: texts.append(text) or call(self, text, **kwargs)
    )
    encoder = Encoder(tokenizer)
    first = encoder.tokens(queries()[0])
    asked = len(texts)
    first[0].append(7)  # what a caller does with it is its own
    assert encoder.tokens(queries()[0])[0] == first[0][:-1]
    encoder(queries()[:1])
    assert len(texts) == asked
