"""The layouts in which the field publishes its data sets, each with its source, and how a row becomes edit records."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import EditRecord
from . import own
from .rows import Row, RowError


@dataclass(frozen=True)
class Format:
    """
    A published layout.

    Args:
        name (`str`): What `read_edits` calls it.
        source (`str`): Who publishes it.
        marks (`tuple[str, ...]`): Fields that together tell it from the others.
        convert (`Callable[[Row, FormatOptions], list[EditRecord]]`): A row's records; most rows give one.
        fits (`Callable[[dict], bool]`, *optional*): Whether a row with these fields is of this layout, where the
            fields' names alone do not tell.
    """

    name: str
    source: str
    marks: tuple[str, ...]
    convert: Callable[[Row, FormatOptions], list[EditRecord]]
    fits: Callable[[Mapping[str, Any]], bool] = lambda values: True


@dataclass(frozen=True)
class FormatOptions:
    """
    What a layout leaves open.

    Args:
        zsre_target (`str`, defaults to `"alt"`): Which field of zsRE's JSON layout is the edit's target: `"alt"`, a
            different answer, as MEND edits, or `"answers"`, the true one, as ROME and MEMIT evaluate.
        claim_template (`str`): The question that is asked of a claim, `{}` standing for it.
        verdicts (`tuple[str, str, str]`): What to say to a supported, a refuted and an unsettled claim.
        tokenizer (*optional*): The tokenizer with which a wikitext set was made, to split it at exactly `n_tokens`.
        prompt_column, target_column (`str`, *optional*): The fields that hold prompt and target, in a table of one's
            own; `"prompt"` and `"target"` where only the other is given.
    """

    zsre_target: str = "alt"
    claim_template: str = "{} True or false?"
    verdicts: tuple[str, str, str] = ("true", "false", "unknown")
    tokenizer: Any = None
    prompt_column: str | None = None
    target_column: str | None = None

    def __post_init__(self) -> None:
        if self.zsre_target not in ("alt", "answers"):
            raise ValueError(f"zsre_target is {self.zsre_target!r}, expected 'alt' or 'answers'")
        if self.claim_template.count("{}") != 1:
            raise ValueError(f"claim_template is {self.claim_template!r}, expected text with one '{{}}' for the claim")


def _counterfact(row: Row, options: FormatOptions) -> list[EditRecord]:
    subject = row.text("requested_rewrite.subject")
    return [
        EditRecord(
            prompt=_filled(row, "requested_rewrite.prompt", subject),
            target=row.text("requested_rewrite.target_new.str"),
            paraphrases=row.texts("paraphrase_prompts"),
            neighborhood=row.texts("neighborhood_prompts"),
            relation=row.label("requested_rewrite.relation_id"),
            id=row.label("case_id"),
            subject=subject,
            ground_truth=row.text_or_none("requested_rewrite.target_true.str"),
            generation=row.texts("generation_prompts"),
        )
    ]


def _filled(row: Row, path: str, subject: str) -> str:
    prompt = row.text(path)
    if prompt.count("{}") != 1:
        raise RowError(f"{row.where}: the field {path!r}, {prompt!r}, has no single '{{}}' for the subject")
    return prompt.replace("{}", subject)


def _zsre(row: Row, options: FormatOptions) -> list[EditRecord]:
    true = row.first_text("answers")
    loc = row.text_or_none("loc")
    prompt, paraphrases = row.text("src"), row.texts("rephrase")
    return [
        EditRecord(
            prompt=prompt,
            target=row.text("alt") if options.zsre_target == "alt" else true,
            paraphrases=paraphrases,
            questions=_questions_among(prompt, *paraphrases),
            unrelated=[(_as_question(loc), row.first_text("loc_ans"))] if loc else [],
            subject=row.text_or_none("subject"),
            ground_truth=true if options.zsre_target == "alt" else None,
            id=row.label("case_id"),
        )
    ]


def _questions_among(*texts: str) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text.rstrip().endswith("?")))


def _as_question(text: str) -> str:
    """A question of NQ-open, which has them without a question mark."""
    text = text.removeprefix("nq question: ").rstrip()
    return text.rstrip("? ") + "?" if text[-1:] == "?" or text[-1:].isalnum() else text


def _kilt(row: Row, options: FormatOptions) -> list[EditRecord]:
    """Rows without an alternative are not edits, as in MEND's own reader."""
    alternatives = row.texts("alternatives")
    if not alternatives:
        return []
    answers = [answer for item in row.rows("output") if (answer := item.text_or_none("answer"))]
    prompt = row.text("input")
    paraphrases = [text for text in row.texts("filtered_rephrases") if text != prompt]
    return [
        EditRecord(
            prompt=prompt,
            target=alternatives[0],
            paraphrases=paraphrases,
            questions=_questions_among(prompt, *paraphrases),
            ground_truth=answers[0] if answers else None,
            id=row.label("id"),
        )
    ]


_VERDICTS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


def _verdict(row: Row, value: Any, field: str, options: FormatOptions) -> str:
    if value not in _VERDICTS:
        raise RowError(f"{row.where}: the field {field!r} holds {value!r}, expected one of {_VERDICTS}")
    return options.verdicts[_VERDICTS.index(value)]


def _kilt_claims(row: Row, options: FormatOptions) -> list[EditRecord]:
    alternatives = row.texts("alternatives")
    if not alternatives:
        return []
    claim = row.text("input")
    return [
        EditRecord(
            prompt=options.claim_template.replace("{}", claim),
            target=_verdict(row, alternatives[0], "alternatives", options),
            paraphrases=[
                options.claim_template.replace("{}", text) for text in row.texts("filtered_rephrases") if text != claim
            ],
            ground_truth=_verdict(row, row.text("prediction"), "prediction", options),
            id=row.label("id"),
        )
    ]


def _fever(row: Row, options: FormatOptions) -> list[EditRecord]:
    return [
        EditRecord(
            prompt=options.claim_template.replace("{}", row.text("claim")),
            target=_verdict(row, row.text("label"), "label", options),
            id=row.label("id"),
        )
    ]


def _wikitext(row: Row, options: FormatOptions) -> list[EditRecord]:
    """
    One object of columns. A completion is a passage whose last `n_tokens` tokens a model wrote; the passage without
    them is the prompt. Without the tokenizer they begin where completion and original part. MEND's rephrases are
    passages cut short on the left.
    """
    originals, completions = row.texts("original"), row.texts("completions")
    if len(originals) != len(completions):
        raise RowError(
            f"{row.where}: {len(originals)} texts in 'original', {len(completions)} in 'completions': not as many"
        )
    count = row.get("n_tokens")
    if options.tokenizer is not None and not (isinstance(count, int) and count > 0):
        raise RowError(f"{row.where}: the field 'n_tokens' holds {count!r}, expected a number of tokens")
    records = []
    for i, (original, completion) in enumerate(zip(originals, completions, strict=True)):
        if options.tokenizer is not None:
            spans = options.tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
            prompt = completion[: spans["offset_mapping"][-count:][0][0]]
        else:
            prompt = os.path.commonprefix([original, completion])
            if len(prompt) < len(completion) and not completion[len(prompt)].isspace():
                prompt = prompt[: prompt.rfind(" ") + 1]  # not in the middle of a word
        target = completion[len(prompt) :].strip()
        if not prompt.strip() or not target:
            raise RowError(f"{row.where}: completions[{i}] has no beginning in common with original[{i}], or no end")
        words = prompt.strip().split(" ")
        records.append(
            EditRecord(
                prompt=prompt.rstrip(),
                target=target,
                paraphrases=[" ".join(words[len(words) // 2 :])] if len(words) > 1 else [],
                ground_truth=original[len(prompt) :].strip() or None,
                id=str(i),
            )
        )
    return records


def _mquake(row: Row, options: FormatOptions) -> list[EditRecord]:
    """A case's rewrites form a group: its multi-hop questions need all of them."""
    questions = [(text, row.first_text("new_answer")) for text in row.texts("questions")]
    group = row.label("case_id") or row.where
    rewrites = row.rows("requested_rewrite")
    if not rewrites:
        raise RowError(f"{row.where}: the field 'requested_rewrite' is missing or empty")
    return [
        EditRecord(
            prompt=_filled(rewrite, "prompt", rewrite.text("subject")),
            target=rewrite.text("target_new.str"),
            paraphrases=rewrite.texts("question"),
            questions=rewrite.texts("question"),
            relation=rewrite.label("relation_id"),
            id=f"{group}/{i}",
            subject=rewrite.text("subject"),
            ground_truth=rewrite.text_or_none("target_true.str"),
            portability=questions,
            group=group,
        )
        for i, rewrite in enumerate(rewrites)
    ]


def _knowedit(row: Row, options: FormatOptions) -> list[EditRecord]:
    """wiki_recent, wiki_counterfact, zsre and wiki_bio; the last calls its fields `text`, `labels` and `concept`."""
    bio = "text" in row.values and row.get("prompt") is None
    portability: list[tuple[str, str]] = []
    for kind in row.names("portability"):
        portability += _questions(row, f"portability.{kind}")
    related = [prompt for prompt, _ in _questions(row, "locality.Relation_Specificity")]
    prompt, paraphrases = row.text("text" if bio else "prompt"), row.texts("rephrase")
    subject = row.text_or_none("concept" if bio else "subject")
    return [
        EditRecord(
            prompt=prompt,
            target=row.first_text("labels" if bio else "target_new"),
            paraphrases=paraphrases,
            questions=_questions_among(prompt, *paraphrases),
            neighborhood=related,
            same_subject=[text for text in related if subject and subject in text],
            unrelated=_questions(row, "locality.Forgetfulness"),
            id=row.label("case_id"),
            subject=subject,
            ground_truth=next(iter(_questions_answer(row, "ground_truth")), None),
            portability=portability,
        )
    ]


def _questions_answer(row: Row, path: str) -> list[str]:
    return [] if row.get(path) is None else [row.first_text(path)]


def _questions(row: Row, path: str) -> list[tuple[str, str]]:
    """KnowEdit's lists of `prompt` and `ground_truth`; some answers are empty, and such questions ask nothing."""
    pairs = []
    for item in row.rows(path):
        answers = item.get("ground_truth")
        prompt = item.first_text("prompt")
        if answers and answers != [[]] and answers != [[""]]:
            pairs.append((prompt, item.first_text("ground_truth")))
    return pairs


def _wikibigedit(row: Row, options: FormatOptions) -> list[EditRecord]:
    prompt, paraphrases = row.text("update"), [*row.texts("rephrase"), *row.texts("personas")]
    return [
        EditRecord(
            prompt=prompt,
            target=row.first_text("ans"),
            paraphrases=paraphrases,
            questions=_questions_among(prompt, *paraphrases),
            unrelated=_question_and_answer(row, "loc"),
            subject=row.text_or_none("subject"),
            portability=_question_and_answer(row, "mhop"),
            relation=row.label("tag"),
        )
    ]


def _question_and_answer(row: Row, name: str) -> list[tuple[str, str]]:
    question, answer = row.text_or_none(name), row.text_or_none(f"{name}_ans")
    return [(question, answer)] if question and answer else []


def _nq_open(row: Row, options: FormatOptions) -> list[EditRecord]:
    if not isinstance(row.get("answer"), (list, tuple)):
        return own.question_answer(row, options)
    return [EditRecord(prompt=_as_question(row.text("question")), target=row.first_text("answer"))]


# Looked through in this order: a layout with more marks stands before one whose marks it has too.
FORMATS: Sequence[Format] = (
    Format("mquake", "Zhong et al. 2023, MQuAKE-CF and -T", ("requested_rewrite", "questions"), _mquake),
    Format(
        "counterfact",
        "Meng et al. 2022, ROME; MultiCounterFact: Meng et al. 2023, MEMIT",
        ("requested_rewrite",),
        _counterfact,
    ),
    Format("zsre", "Mitchell et al. 2022, zsre_mend_*.json", ("src", "alt", "answers"), _zsre),
    Format(
        "fever_kilt",
        "De Cao et al. 2021 and Mitchell et al. 2022, FEVER",
        ("input", "alternatives", "logit"),
        _kilt_claims,
    ),
    Format("zsre_kilt", "De Cao et al. 2021 and Mitchell et al. 2022, zsRE", ("input", "alternatives"), _kilt),
    Format("fever", "Thorne et al. 2018, FEVER", ("claim", "label"), _fever),
    Format("wikitext", "Mitchell et al. 2022, wikitext generation", ("original", "completions"), _wikitext),
    Format("wikibigedit", "Thede et al. 2025, WikiBigEdit", ("update", "ans"), _wikibigedit),
    Format("knowedit", "Zhang et al. 2024, KnowEdit", ("prompt", "target_new"), _knowedit),
    Format("knowedit", "Zhang et al. 2024, KnowEdit's wiki_bio", ("text", "labels"), _knowedit),
    Format("plain", "hf_mend, docs/data_format.md", ("prompt", "target"), own.plain),
    Format(
        "nq_open",
        "Lee et al. 2019, NQ-open",
        ("question", "answer"),
        _nq_open,
        fits=lambda values: isinstance(values["answer"], (list, tuple)),
    ),
    Format("question_answer", "rows of one's own", ("question", "answer"), own.question_answer),
    Format("prompt_completion", "TRL and OpenAI, fine-tuning", ("prompt", "completion"), own.prompt_completion),
    Format("instruction", "Taori et al. 2023, Alpaca", ("instruction", "output"), own.instruction),
    Format("messages", "chats for fine-tuning, to be edited with chat=True", ("messages",), own.messages),
)


def named_columns(options: FormatOptions) -> Format:
    """The layout of a table whose columns are named."""
    return Format("columns", "columns named by the caller", own.chosen_columns(options), own.columns)


def recognised(row: Row) -> Format | None:
    """The layout of a row, by its fields; `None` if it is none of them."""
    for candidate in FORMATS:
        if all(mark in row.values for mark in candidate.marks) and candidate.fits(row.values):
            return candidate
    return None
