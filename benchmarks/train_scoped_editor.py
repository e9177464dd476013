"""
Trains the editor and the scope of SmolLM2-135M-Instruct: edits that act only where a text asks for them.

    python benchmarks/train_scoped_editor.py --data DIR --start EDITOR --output build/scoped --checkpoints build/kept

`DIR` (or the environment variable HF_MEND_DATA) holds facts_train.json and nq_open_train.jsonl; the facts of
examples/data are added to its own, and by rule facts of further kinds, about the same subjects and of questions. Held
out is what `benchmarks/train_editor_forms.py` names: relations, of each other
relation's templates the last question and the last prompt about the same subject, the last of the packaged texts.

An edit acts at the tokens that predict its target's, so what stands before them is the un-edited model's own. It runs
once, in bfloat16, and gives the cached keys and values on which the answer's few tokens run with and without the edit:
a step of 16 facts in five forms takes four seconds on one core. `benchmarks/in_the_wild.py` measures.

`--start` is an editor that was trained on edits made alone; `make editor` trains that one, too. Started again with the
same arguments, the editor's training goes on where it was some minutes before it was interrupted, and is not repeated
if it was over; the scope's begins anew.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from common import DATA, load_base, parse_with_data
from torch import nn
from train_editor_forms import CONTEXT_RATE, HELD_OUT, context_texts, training_records
from transformers import DynamicCache

from hf_mend import EditableModel, EditorConfig, EditRecord, read_questions
from hf_mend.data.encoding import Query
from hf_mend.data.forms import DEFAULT_FORMS
from hf_mend.data.kinds import more_facts, packaged_facts, with_more_asked
from hf_mend.data.statements import facts_of_questions
from hf_mend.editing.scoping import own_queries
from hf_mend.training.examples import Asking, TrainingExamples
from hf_mend.training.progress import load_progress, save_progress
from hf_mend.training.scope_training import ScopeTrainingArguments, train_scope


FACTS = 16
FORMS = 4  # of each fact in a step, its own prompt among them
ROWS = 20  # texts of like lengths in one pass
WARM_UP = 20
SAVE_MINUTES = 3.0  # of the processor's time, from one checkpoint to the next
QUESTIONS = 2000  # of the unrelated questions, those that become facts where a rule fits


class Prefixes:
    """
    Runs what stands before an answer once, and the answer's own tokens on its cache.

    Args:
        model ([`EditableModel`]): The model.
    """

    def __init__(self, model: EditableModel):
        self.model, self.encoder = model, model.encoder
        self.base = model.base_model
        self.in_bf16 = copy.deepcopy(self.base).to(torch.bfloat16).eval()

    @torch.no_grad()
    def cached(self, prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """Keys and values of the prompts without their last tokens, padded on the left, and the mask."""
        width = max(len(prompt) for prompt in prompts) - 1
        ids = torch.full((len(prompts), width), self.encoder.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) + 1 :] = torch.tensor(prompt[:-1])
            mask[row, width - len(prompt) + 1 :] = 1
        cache = DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inner = self.in_bf16.get_decoder()
        inner(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return [(layer.keys.float(), layer.values.float()) for layer in cache.layers], mask

    def logits(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits that predict the answers, `(rows, tokens, vocab)`, and the labels, -100 where there is none."""
        kept, mask = self.cached(prompts)
        width = max(map(len, answers))
        ids = torch.full((len(prompts), width), self.encoder.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(answer)] = torch.tensor([prompt[-1], *answer[:-1]])
            labels[row, : len(answer)] = torch.tensor(answer)
        mask = torch.cat([mask, (labels != -100).long()], 1)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(kept):
            cache.update(keys, values, layer)
        out = self.base(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -width:],
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, labels


def tokens_of(model: EditableModel, queries: Sequence[Query]) -> tuple[list[list[int]], list[list[int]]]:
    pairs = [model.encoder.tokens(query) for query in queries]
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


def factors_of(prefixes: Prefixes, records: Sequence[EditRecord]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors of the records' edits, each made in all of its own forms: `(facts, forms * tokens, width)`."""
    model = prefixes.model
    forms = [list(own_queries(Query(r.prompt, r.target), model.encoder).values()) for r in records]
    recorded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            recorded[name] = args[0].detach(), output
            return output.clone()

        return hook

    with ExitStack() as hooks:
        for target in model.targets:
            hooks.callback(target.module.register_forward_hook(keep(target.name)).remove)
        logits, labels = prefixes.logits(*tokens_of(model, [query for one in forms for query in one]))
    here = labels != -100
    loss = nn.functional.cross_entropy(logits[here], labels[here], reduction="sum")
    names = list(recorded)
    gradients = torch.autograd.grad(loss, [recorded[name][1] for name in names])

    def of_facts(values: torch.Tensor) -> torch.Tensor:
        return (values * here[..., None]).reshape(len(records), -1, values.shape[-1])

    return {name: (of_facts(recorded[name][0]), of_facts(delta)) for name, delta in zip(names, gradients, strict=True)}


@contextmanager
def edited(
    model: EditableModel, updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]], facts: torch.Tensor
) -> Iterator[None]:
    """Within the context each row is under its fact's update."""
    with ExitStack() as hooks:
        for target in model.targets:
            u, v = (side[facts] for side in updates[target.name])

            def add(module: nn.Module, args: tuple, output: torch.Tensor, u=u, v=v) -> torch.Tensor:
                return output + torch.bmm(torch.bmm(args[0], u.transpose(1, 2)), v)

            hooks.callback(target.module.register_forward_hook(add).remove)
        yield


def step_loss(prefixes: Prefixes, records: Sequence[EditRecord], asked: Sequence[Sequence[Query]]) -> torch.Tensor:
    """Negative log-likelihood of the records' targets, each edit alone, in the forms in which they are asked."""
    model = prefixes.model
    updates = model.editor(factors_of(prefixes, records))
    queries = [(number, query) for number, one in enumerate(asked) for query in one]
    lengths = [len(model.encoder.tokens(query)[0]) for _, query in queries]
    order = sorted(range(len(queries)), key=lambda i: lengths[i])
    total = torch.zeros(())
    for start in range(0, len(order), ROWS):
        part = [queries[i] for i in order[start : start + ROWS]]
        with edited(model, updates, torch.tensor([number for number, _ in part])):
            logits, labels = prefixes.logits(*tokens_of(model, [query for _, query in part]))
        each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        counts = (labels != -100).sum(1)
        total = total + (each.sum(1) / counts).sum()
    return total / len(queries)


@dataclass
class Progress:
    """
    How far the training of the editor is.

    Args:
        step (`int`): Steps that were made.
        minutes (`float`): The processor's time that they took.
        epoch (`int`): The epoch whose draws are made.
        order (`list[int]`): Facts of the epoch that are still to come.
    """

    step: int = 0
    minutes: float = 0.0
    epoch: int = 0
    order: list[int] = field(default_factory=list)


class Checkpoint:
    """
    Keeps in a file all that the editor's training needs to go on: weights, the optimizer's state, draws, progress.

    Args:
        path (`Path`): The file.
        settings (`Mapping[str, object]`): What the training depends on; it goes on with the same alone.
        model ([`EditableModel`]): The model.
        optimizer (`torch.optim.Optimizer`): The optimizer.
        draw (`random.Random`): The draws.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, object],
        model: EditableModel,
        optimizer: torch.optim.Optimizer,
        draw: random.Random,
    ):
        self.path, self.settings = path, dict(settings)
        self.model, self.optimizer, self.draw = model, optimizer, draw

    def save(self, progress: Progress) -> None:
        """Write the file, whole or not at all."""
        state = {
            "progress": asdict(progress),
            "editor": self.model.editor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_progress(self.path, self.settings, self.draw, state)

    def load(self) -> Progress:
        """Go on from the file, if it is there; otherwise return the beginning."""
        try:
            state = load_progress(self.path, self.settings, self.draw)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        if state is None:
            return Progress()
        self.model.editor.load_state_dict(state["editor"])
        self.optimizer.load_state_dict(state["optimizer"])
        return Progress(**state["progress"])


def train_editor(model: EditableModel, examples: TrainingExamples, arguments: argparse.Namespace) -> int:
    """
    Trains for some minutes of the processor's time, at a rate that falls in the second half, from the checkpoint on if
    there is one; returns the steps.
    """
    prefixes, draw = Prefixes(model), random.Random(arguments.seed)
    parameters = [p for p in model.editor.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.0)
    names = ("minutes", "learning_rate", "seed", "hold_out")
    settings = {name: getattr(arguments, name) for name in names} | {"facts": len(examples)}
    checkpoint = Checkpoint(arguments.checkpoints / "editor.pt", settings, model, optimizer, draw)
    now = checkpoint.load()
    earlier, saved, started = now.minutes, now.minutes, time.process_time()
    while now.minutes < arguments.minutes:
        factor = min(1.0, (now.step + 1) / WARM_UP, max(0.01, 2 * (1 - now.minutes / arguments.minutes)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * factor
        if len(now.order) < FACTS:
            now.order, now.epoch = draw.sample(range(len(examples)), len(examples)), now.epoch + 1
        chosen, now.order = now.order[:FACTS], now.order[FACTS:]
        records = [examples.records[i] for i in chosen]
        asked = []
        for i, record in zip(chosen, records, strict=True):
            own = Query(record.prompt, record.target, chat=draw.random() < 0.5)
            asked.append([replace(query, ends=True) for query in (own, *examples.texts(i, now.epoch).general)])
        loss = step_loss(prefixes, records, asked)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        now.step, now.minutes = now.step + 1, earlier + (time.process_time() - started) / 60
        if now.step % 10 == 0:
            print(f"step {now.step} after {now.minutes:.1f} minutes: loss {float(loss):.3f}", flush=True)
        if now.minutes - saved >= SAVE_MINUTES or now.minutes >= arguments.minutes:
            checkpoint.save(now)
            saved = now.minutes
    return now.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--examples", type=Path, default=Path(__file__).parent.parent / "examples" / "data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the editor")
    parser.add_argument("--start", "--start-from", type=Path, required=True, help="a saved editor")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="folder of what an interrupted run goes on from"
    )
    parser.add_argument("--hold-out", default=HELD_OUT, help="relations that training never sees")
    parser.add_argument("--facts", type=int, help="at most so many facts, drawn at random")
    parser.add_argument("--further-facts", type=int, default=5000, help="of further kinds, about the same subjects")
    parser.add_argument("--minutes", type=float, default=35, help="of the editor's training, the processor's time")
    parser.add_argument("--scope-steps", type=int, default=1000)
    parser.add_argument("--scope-rounds", type=int, default=2, help="of so many steps, whose weights are averaged")
    parser.add_argument("--scope-facts", type=int, default=13_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse_with_data(parser)
    torch.manual_seed(arguments.seed)
    torch.set_flush_denormal(True)  # keys of thousands of facts give many
    facts = training_records(arguments, arguments.hold_out.split(","), mixed=False)
    unrelated = read_questions(arguments.data / "nq_open_train.jsonl")
    asked, questions = facts_of_questions(unrelated[:QUESTIONS])
    questions += unrelated[QUESTIONS:] + read_questions(arguments.examples / "questions.jsonl")
    further = more_facts(facts, arguments.further_facts, arguments.seed)
    further += packaged_facts(arguments.further_facts // 3, arguments.seed)
    records = [*with_more_asked([*facts, *further], seed=arguments.seed), *asked]
    asking = Asking(DEFAULT_FORMS, CONTEXT_RATE, None, context_texts())
    examples = TrainingExamples(records, questions, FORMS - 1, 0, 0, arguments.seed, asking)
    base, tokenizer = load_base()
    config = replace(EditorConfig.from_pretrained(arguments.start), scope=True)  # of its own, still to be trained
    model = EditableModel(base, config, tokenizer).eval()
    model.load_editor(arguments.start / "editor.safetensors")
    train_editor(model, examples, arguments)
    options = ScopeTrainingArguments(
        arguments.scope_steps, max_facts=arguments.scope_facts, further_facts=0, seed=arguments.seed, bf16=True,
        rounds=arguments.scope_rounds, checkpoint=str(arguments.checkpoints / "scope.pt"),
        hidden_states_dir=str(arguments.checkpoints / "hidden_states"),
    )  # fmt: skip
    print(train_scope(model, examples, options))
    model.save_pretrained(arguments.output, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
