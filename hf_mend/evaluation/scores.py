"""The field's other metrics, with their sources, of a model with the edits that it carries."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics

import torch

from ..bases.limits import longest_input
from ..bases.split import logits_of
from ..data.encoding import Query, batches
from ..data.records import EditRecord
from ..model import EditableModel
from .generation import answer


_INSTRUCTION = "Answer the question with the answer alone.\nQuestion: {}\nAnswer:"


def bootstrap_interval(
    values: Sequence[float],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """
    Return the percentile bootstrap interval of a mean (Efron 1979); the same seed gives the same interval.

    Args:
        values (`Sequence[float]`): One value per record.
        level (`float`, defaults to 0.95): Share of the resampled means that lie inside.
        draws (`int`, defaults to 2000): Number of resampled means.
        seed (`int`, defaults to 0): Seed of the resampling.
        weights (`Sequence[float]`, *optional*): Weight of each value in the mean, drawn together with the value.

    Raises:
        ValueError: There are fewer than two values, `level` is not between 0 and 1, or `draws` is below 1.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, there are {len(values)}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a share between 0 and 1, such as 0.95")
    if draws < 1:
        raise ValueError(f"draws is {draws}, expected at least 1")
    draw = torch.Generator().manual_seed(seed)
    weight = torch.tensor([1.0] * len(values) if weights is None else weights, dtype=torch.float32)
    weighted = torch.tensor(values, dtype=torch.float64) * weight
    means: list[float] = []
    while len(means) < draws:
        some = min(draws - len(means), max(1, 2_000_000 // len(values)))  # bounds the memory
        index = torch.randint(len(values), (some, len(values)), generator=draw)
        means += (weighted[index].sum(-1) / weight[index].sum(-1)).tolist()
    means.sort()
    tail = (1 - level) / 2
    return means[int(tail * (draws - 1))], means[math.ceil((1 - tail) * (draws - 1))]


def n_gram_entropy(text: str) -> float:
    """
    Return the fluency of a text (Meng et al. 2022, ROME): the mean of the entropies of bigrams and trigrams in bits,
    weighted 2/3 and 4/3. Punctuation marks are words of their own.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    entropies = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        total = sum(counts.values())
        entropies.append(weight * -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0)
    return sum(entropies) / 2


def normalized(text: str) -> str:
    """
    Return an answer without case, punctuation, articles and double spaces (Rajpurkar et al. 2016, SQuAD). Unlike
    there, a step that would leave nothing is omitted, since silence is not the answer "A" or "+".
    """
    text = text.lower()
    words = "".join(character for character in text if character not in string.punctuation)
    content = re.sub(r"\b(a|an|the)\b", " ", words)
    return " ".join((content if content.strip() else words if words.strip() else text).split())


def in_the_wild(
    model: EditableModel, record: EditRecord, max_new_tokens: int = 64, instruction: str = _INSTRUCTION
) -> dict[str, bool]:
    """
    Return whether the model answers with the target ("The Mirage of Model Editing", 2025): greedy generation until the
    model stops by itself, without teacher forcing and cuts at the target's length, and exact match after
    normalisation.

    Args:
        model ([`EditableModel`]): The model with its edits.
        record ([`EditRecord`]): The edited record.
        max_new_tokens (`int`, defaults to 64): The most tokens of an answer.
        instruction (`str`): A text with the question in place of `{}`.

    Returns:
        `dict[str, bool]`: Whether the answer to the `"question"` alone, with the `"instruction"`, and, if the
        tokenizer has a template, in the `"chat"` template is the target.
    """
    return {
        name: normalized(answer(model, prompt, chat=chat, max_new_tokens=max_new_tokens)) == normalized(record.target)
        for name, (prompt, chat) in simple_questions(model, record, instruction).items()
    }


def simple_questions(
    model: EditableModel, record: EditRecord, instruction: str = _INSTRUCTION
) -> dict[str, tuple[str, bool]]:
    """Return the questions of [`in_the_wild`]: name -> prompt, and whether it is put into the chat template."""
    asked = {"question": (record.prompt, False), "instruction": (instruction.replace("{}", record.prompt), False)}
    if getattr(model.tokenizer, "chat_template", None):
        asked["chat"] = (record.prompt, True)
    return asked


@torch.no_grad()
def mean_log_probabilities(model: EditableModel, queries: Sequence[Query], batch_size: int = 16) -> list[float]:
    """Return the mean teacher-forced log-probability, in nats, of the tokens of each query's answer."""
    found: list[float] = []
    for chunk in batches(queries, batch_size):
        rows = model.encoder(chunk).to(model.device)
        logits = logits_of(model.split, rows)  # (tokens, vocab)
        labels = rows.next_tokens[rows.positions].to(logits.device)
        logs = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        found += [float(part.mean()) for part in logs.split(rows.positions.sum(-1).tolist())]
    return found


def counterfact_scores(model: EditableModel, record: EditRecord) -> dict[str, float]:
    """
    Return CounterFact's scores and magnitudes (Meng et al. 2022): how often, and by how much, the target is likelier
    than the ground truth on the prompt (efficacy) and its paraphrases, and the ground truth likelier than the target
    on the neighbours. The probability of an answer is the geometric mean of its tokens' probabilities.

    Args:
        model ([`EditableModel`]): The model with its edits.
        record ([`EditRecord`]): The edited record, with its ground truth.

    Raises:
        ValueError: The record has no ground truth.
    """
    if not record.ground_truth:
        raise ValueError(f"CounterFact's scores need ground_truth, which record {record.id or record.prompt!r} lacks")
    out: dict[str, float] = {}
    kinds = {"efficacy": [record.prompt], "paraphrase": record.paraphrases, "neighborhood": record.neighborhood}
    for kind, prompts in kinds.items():
        if not prompts:
            continue
        new, true = (
            mean_log_probabilities(model, [Query(prompt, text) for prompt in prompts])
            for text in (record.target, record.ground_truth)
        )
        sign = -1 if kind == "neighborhood" else 1
        margins = [sign * (math.exp(a) - math.exp(b)) for a, b in zip(new, true, strict=True)]
        out[f"{kind}_score"] = sum(margin > 0 for margin in margins) / len(margins)
        out[f"{kind}_magnitude"] = sum(margins) / len(margins)
    return out


def harmonic_score(efficacy: float, paraphrase: float, neighborhood: float) -> float:
    """Return the harmonic mean of CounterFact's three scores (Meng et al. 2022), which is 0 if one of them is."""
    scores = (efficacy, paraphrase, neighborhood)
    return 0.0 if min(scores) <= 0 else 3 / sum(1 / score for score in scores)


def portability(model: EditableModel, record: EditRecord) -> float:
    """
    Return the share of portability questions (Yao et al. 2023) for which greedy generation begins with the answer,
    after normalisation.

    Raises:
        ValueError: The record has no portability question.
    """
    if not record.portability:
        raise ValueError(f"portability needs questions, which record {record.id or record.prompt!r} lacks")
    correct = 0
    for question, expected in record.portability:
        said = normalized(answer(model, question))
        correct += f"{said} ".startswith(f"{normalized(expected)} ")
    return correct / len(record.portability)


def held_out_passages(
    model: EditableModel, text: str | None = None, passages: int = 12, length: int = 128
) -> list[list[int]]:
    """
    Return passages of a text as token ids. The default text is Python's documentation, which comes with the
    interpreter (with small differences between versions), needs no download and is unrelated to the facts of data
    sets.

    Args:
        model ([`EditableModel`]): The model, whose tokenizer is used.
        text (`str`, *optional*): Another text.
        passages (`int`, defaults to 12): Number of passages, spread evenly over the text; fewer if the text is short.
        length (`int`, defaults to 128): Tokens per passage; fewer if the model takes fewer.

    Raises:
        ValueError: The text has fewer than two tokens.
    """
    length = min(length, longest_input(model.config) or length)
    text = "\n".join(topics[name] for name in sorted(topics)) if text is None else text
    ids = model.encoder.tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"the text for perplexity has {len(ids)} tokens, expected at least two")
    passages = max(1, min(passages, len(ids) // length))
    spread = len(ids) // passages
    return [ids[i * spread : i * spread + length] for i in range(passages)]


def perplexity(model: EditableModel, texts: Sequence[str | Sequence[int]]) -> float:
    """
    Return the perplexity of held-out texts: the exponential of the mean negative log-likelihood of all tokens except
    each text's first.

    Args:
        model ([`EditableModel`]): The model with its edits.
        texts (`Sequence[str]` or `Sequence[Sequence[int]]`): The texts, or their token ids.

    Raises:
        ValueError: The model is an encoder-decoder, there is no text, or a text has fewer than two tokens or more than
            the model takes.
    """
    encoder, longest = model.encoder, longest_input(model.config)
    if encoder.is_encoder_decoder:
        raise ValueError("perplexity of a text needs a decoder-only model")
    if not texts:
        raise ValueError("perplexity needs at least one text, there are none")
    total, count = 0.0, 0
    for text in texts:
        ids = encoder.tokens(Query(text))[0] if isinstance(text, str) else list(text)
        if len(ids) < 2:
            raise ValueError(f"{text!r} has {len(ids)} tokens; perplexity needs at least two")
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"the text {str(text)[:60]!r}... has {len(ids)} tokens, the model takes {longest}; cut it, or let "
                "held_out_passages do it"
            )
        rows = encoder.pad([(ids[:1], ids[1:])]).to(model.device)
        with torch.no_grad():
            logits = model(**rows.inputs, use_cache=False).logits[rows.positions].float()
        labels = rows.next_tokens[rows.positions].to(logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return math.exp(total / count)


def drawdown(model: EditableModel, measure: Callable[[], float], higher_is_better: bool = True) -> float:
    """
    Return the drawdown of the edits (Mitchell et al. 2022, section 2): the loss of accuracy, or the increase of
    perplexity, against the model without edits.

    Args:
        model ([`EditableModel`]): The model with its edits.
        measure (`Callable[[], float]`): A function that measures accuracy or perplexity on unrelated data.
        higher_is_better (`bool`, defaults to `True`): `False` for perplexity.
    """
    after = measure()
    with model.disable_edits():
        before = measure()
    return before - after if higher_is_better else after - before
