"""The editing loss on a base whose weights are shared out over two processes; run by test_trainer.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from support.models import RECORDS, build_model, make_tokenizer, small_config
from support.paths import ROOT
from support.training import QUESTIONS
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_mend import EditableModel, get_editable_model
from hf_mend.bases.sharded import whole_state
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import EditCollator, TrainingExamples
from hf_mend.training.objective import EditingObjective


def build(architecture: str, scope: bool) -> EditableModel:
    torch.manual_seed(0)
    return get_editable_model(build_model(architecture), small_config(scope=scope), make_tokenizer())


def share_out(objective: EditingObjective) -> None:
    """Makes the units that Accelerate makes of the example's configuration, and shares each out."""
    example = ROOT / "examples" / "accelerate" / "fsdp.yaml"
    names = yaml.safe_load(example.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    if objective.config.model_type == "t5":
        names = ["T5Block", "T5ForConditionalGeneration", names[-1]]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=names,
        cpu_ram_efficient_loading=False,
    )
    plugin.set_auto_wrap_policy(objective)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, objective)
    for module in reversed([module for module in objective.modules() if is_unit(module)]):
        fully_shard(module)
    fully_shard(objective)


def loss_and_gradients(architecture: str, scope: bool, sharded: bool, folder: Path) -> dict[str, float]:
    """The loss of one batch and the norm of each gradient of the editor, which is saved and loaded on the way."""
    model = build(architecture, scope)
    examples = TrainingExamples(RECORDS[:4], QUESTIONS, continuation_rows=1)
    if scope:
        examples.for_a_scope()
    calibrate(model, examples, 4, 4)
    objective = EditingObjective(model)
    if sharded:
        share_out(objective)
        editor = whole_state(model.editor)
        if dist.get_rank() == 0:
            model.save_pretrained(folder / architecture, state_dict=editor)
        dist.barrier()
        with torch.no_grad():
            for parameter in model.editor.parameters():
                parameter.zero_()
        model.load_editor(folder / architecture / "editor.safetensors")
    batch = EditCollator(model.encoder, scoped=scope)([examples[i] for i in range(4)])
    loss = objective(batch).loss
    loss.backward()
    assert model.split.goes_on is (True if scope else None)  # on the keys and values of what stands before answers
    found = {"loss": float(loss)}
    for name, parameter in model.editor.named_parameters():
        assert isinstance(parameter, DTensor) == sharded
        gradient = parameter.grad.full_tensor() if sharded else parameter.grad
        found[name] = float(gradient.norm())
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {
        f"{architecture} {scope}": {
            name: loss_and_gradients(architecture, scope, sharded, folder)
            for name, sharded in (("whole", False), ("sharded", True))
        }
        for architecture, scope in (("llama", False), ("llama", True), ("t5", False))
    }
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
