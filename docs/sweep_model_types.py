"""
Edits a tiny random model of every type that transformers builds as a causal, a sequence-to-sequence or a multimodal
language model, and writes docs/model_types.md.

    PYTHONPATH=tests python docs/sweep_model_types.py --results build/model_types.jsonl

Each type has a process and a time limit of its own. Its configuration is the library's default one, made small by the
names of its fields, with the few settings of `SETTINGS` that a small one needs. Types that the results have already
are not swept again; `--again` names those that are.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from support.gradients import autograd_gradients, encoder_for, queries
from support.models import RECORDS, VOCAB, all_logits, initialize, make_tokenizer
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_mend import EditableModel
from hf_mend.bases.gradients import trace
from hf_mend.bases.split import SplitModel


PAGE = Path(__file__).with_name("model_types.md")

KINDS = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}

# Field of a configuration -> its value in a small one, where the type has the field.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "model_dim", "dim_model", "embedding_size",
         "word_embed_proj_dim", "d_embed", "projection_dim", "hidden_dim", "decoder_hidden_size", "out_hidden_size",
         "output_dim", "encoder_hidden_size", "cross_attention_hidden_size", "attention_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "dim_ff",
         "feed_forward_size", "dff", "ffn_hidden_size", "encoder_intermediate_size", "decoder_intermediate_size"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_dim", "expert_ffn_hidden_size",
         "moe_shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "num_encoder_layers", "depth", "layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads",
         "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "decoder_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_dim", "kv_channels"), 8),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_topk", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions",
         "max_source_positions", "max_encoder_position_embeddings", "max_decoder_position_embeddings"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window"), 16),
    **dict.fromkeys(("image_size", "input_size"), 28),
    "v_head_dim": 8, "query_pre_attn_scalar": 8, "patch_size": 14, "rotary_dim": 4,
    "original_max_position_embeddings": 64,
    "vocab_size": VOCAB, "decoder_vocab_size": VOCAB, "text_vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2,
    "first_k_dense_replace": 1, "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8,
    "hidden_size_per_layer_input": 8,
    "num_mel_bins": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "chunk_size": 8, "mamba_chunk_size": 8, "moe_k": 2, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 8,
    "mamba_d_ssm": 64, "mamba_head_dim": 8, "mamba_n_groups": 1, "n_groups": 1,
    "linear_value_head_dim": 8, "num_kv_shared_layers": 0, "is_decoder": True,
}  # fmt: skip

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_HALF_MROPE = {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
_MAMBA = {"mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8}
_LINEAR_AND_FULL = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "hc_lowrank": 8,
    "indexer_compress_ratio": 4, "ngram_vocab_size_base": 128, "ple_embed_dim": 8, "split_ngram_parts": 2,
}  # fmt: skip
# Type -> settings that its small configuration needs beside or instead of those.
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE}},
    "cosmos3_edge": {"text_config": {"rope_parameters": _MROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "chameleon": {"vocabulary_map": {"<image>": 150}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": None},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 24], "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
        }
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "florence2": {
        "vision_config": {
            "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
            "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4],
            "projection_dim": 32, "window_size": 7,
        }
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm46v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _HALF_MROPE}},
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0, "head_dim": 0, "index_topk": 16, "index_head_dim": 8, "index_n_heads": 2,
            "linear_head_dim": 8,
        }
    },
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "glmga": {"text_config": {"rope_parameters": _MROPE}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": _LINEAR_AND_FULL, **_MAMBA},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}}},
    "hy_v4_vl": {"text_config": {"qk_rope_head_dim": 8, "rope_parameters": _MROPE}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 32}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {"layer_types": _LINEAR_AND_FULL, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "molmo2": {"vision_config": {"image_size": [28, 28]}, "adapter_config": {"vision_feature_layer": [3, 2]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "pegasus_x": {"block_size": 8, "num_global_tokens": 4},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 150, "text_config": {"rope_parameters": _MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 150, "text_config": {"rope_parameters": _MROPE}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attention_head_size": 8,
        "attn_layers": ["local", "local", "local", "local"], "local_attn_chunk_length": 16,
    },
    "xlnet": {"d_inner": 48, "d_head": 8},
    "xlstm": {"mode": "train", "chunk_size": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Type -> why it does not go on with text by itself.
NO_TEXT = {
    "gemma4_assistant": "drafts tokens for another model, from that model's hidden states",
    "gemma4_unified_assistant": "drafts tokens for another model, from that model's hidden states",
    "idefics": "reads text beside an image alone",
    "kosmos-2": "reads text beside an image alone",
    "kyutai_speech_to_text": "writes down sound alone",
    "musicgen": "writes sound",
    "musicgen_melody": "writes sound",
    "qwen2_5_omni": "several models as one, without a pass of its own: edit its qwen2_5_omni_thinker",
    "qwen3_omni_moe": "several models as one, without a pass of its own: edit its qwen3_omni_moe_thinker",
    "udop": "reads text with its place on a page alone",
    "voxtral_realtime": "writes down sound alone",
}


def small_config(model_type: str) -> Any:
    """A type's configuration, made small."""
    return _small(transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type], SETTINGS.get(model_type, {}))


def _small(config_class: Any, settings: dict[str, Any]) -> Any:
    given = _fields(config_class)
    values: dict[str, Any] = {name: value for name, value in SMALL.items() if name in given}
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if part is AutoConfig:
            default = getattr(config_class(), name, None)
            part = type(default) if default is not None else None
        if part is not None:
            values[name] = _small(part, settings.get(name, {})).to_dict()
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = 4  # keys and values are made for each head
    values |= {name: value for name, value in settings.items() if name not in getattr(config_class, "sub_configs", {})}
    return config_class(**values)


def _fields(config_class: Any) -> set[str]:
    """The names that a configuration takes, under its own names for common ones too."""
    names = set(inspect.signature(config_class.__init__).parameters)
    names |= set(getattr(config_class, "__annotations__", {}))
    for base in config_class.__mro__:
        if base is not transformers.PreTrainedConfig:
            names |= set(base.__dict__.get("__annotations__", {}))
    return names | {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}


def build(model_type: str) -> PreTrainedModel:
    """A small random model of a type, by the first kind that builds it."""
    kinds = [(name, types[model_type]) for name, types in KINDS.items() if model_type in types]
    for number, (auto, named) in enumerate(kinds, start=1):
        try:
            return _built(model_type, auto, named)
        except Exception:
            if number == len(kinds):
                raise
    raise KeyError(model_type)


def _built(model_type: str, auto: str, named: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = small_config(model_type)
    if auto == "AutoModelForSeq2SeqLM" and config.decoder_start_token_id is None:
        config.decoder_start_token_id = 2
    try:
        model = getattr(transformers, auto).from_config(config).eval()
    except ValueError as error:  # some types have a class that the mapping names and does not find
        if "Unrecognized configuration class" not in str(error):
            raise
        model = getattr(transformers, named if isinstance(named, str) else named[0])._from_config(config).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 100_000_000:
        raise ValueError(f"{size} parameters: not a small model")
    return initialize(model.float())


# ---- what is checked of one type ----


def check(model_type: str) -> dict[str, Any]:
    """What editing a small model of a type comes to: `result` is exact, refused, failing, or not built."""
    try:
        base = build(model_type)
    except Exception as error:
        return _found("not built", error)
    tokenizer = make_tokenizer()
    try:
        plain = all_logits(base, tokenizer)
        text_alone = None
        if not bool(torch.isfinite(plain).all()):
            return {"result": "not built", "why": "its own logits are not finite"}
    except Exception as error:
        text_alone = error
    try:
        return _check(base, tokenizer)
    except (ValueError, TypeError, NotImplementedError) as error:
        ours = _raised_by_the_library(error)
        found = _found("refused" if ours else "failing", error)
        if text_alone is not None and not ours:
            found = _of_text_alone(text_alone)
        return found
    except Exception as error:
        if text_alone is not None:
            return _of_text_alone(text_alone)
        return _found("failing", error)


def _check(base: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    model = EditableModel(base, tokenizer=tokenizer).eval()
    plain = all_logits(model, tokenizer)
    result = model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=2, keep_failed=True)
    wrong = []
    if result.probability_after == result.probability_before:
        wrong.append("an edit changes nothing")
    model.undo()
    if not torch.equal(all_logits(model, tokenizer), plain):
        wrong.append("an undo does not restore the logits")
    targets = list(model.targets)
    encoder = encoder_for(base, tokenizer)
    rows = encoder(queries())
    split = SplitModel(base, targets)
    notes = []
    try:
        factors, _ = trace(split, targets, rows.inputs, rows.next_tokens)
    except ValueError as error:
        if "tokens before rows" not in str(error):
            raise
        factors, notes = None, ["one edit at a time"]
    if factors is not None:
        for name, want in autograd_gradients(base, targets, rows).items():
            if _differ(sum(_gradient(factors, name, row) for row in range(len(rows))), want):
                wrong.append(f"factors of {name} are not its gradient")
        for i, query in enumerate(queries()):
            one = encoder([query])
            alone, _ = trace(split, targets, one.inputs, one.next_tokens)
            if any(_differ(_gradient(alone, t.name, 0), _gradient(factors, t.name, i)) for t in targets):
                wrong.append(f"row {i} of a batch differs from the row alone")
                break
    layers = sorted({re.sub(r"^.*?\.\d+\.", "", target.name) for target in targets})
    if wrong:
        return {"result": "failing", "why": "; ".join(wrong), "layers": layers}
    return {"result": "exact", "why": "; ".join(notes), "layers": layers}


def _gradient(factors: Any, name: str, row: int) -> torch.Tensor:
    x, delta = factors[name]
    return torch.einsum("to,ti->oi", delta[row], x[row])


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) > 2e-3 * float(other.abs().max()) + 1e-6


def _found(result: str, error: BaseException) -> dict[str, Any]:
    lines = traceback.format_exception(error)
    return {
        "result": result, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}",
        "trace": "".join(lines)[-1800:],
    }  # fmt: skip


def _of_text_alone(error: BaseException) -> dict[str, Any]:
    """What an error in the model's own pass of text comes to: some say in words that they need an image or sound."""
    in_words = isinstance(error, ValueError) and re.search("pixel_values|image|audio|input_features", str(error))
    found = _found("refused" if in_words else "not built", error)
    return {**found, "why": f"the model's own pass of text alone: {found['why']}"}


def _raised_by_the_library(error: BaseException) -> bool:
    """Whether the innermost frame of an error is the library's: it was refused, and did not break."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and f"{os.sep}hf_mend{os.sep}" in frames[-1].filename


# ---- all types ----


def all_types() -> list[str]:
    return sorted({name for types in KINDS.values() for name in types})


def _run(model_type: str, connection: Any) -> None:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    connection.send(check(model_type))


def swept(model_type: str, seconds: float) -> dict[str, Any]:
    """`check` in a process of its own, which is ended after some seconds."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(model_type, theirs))
    started = time.monotonic()
    process.start()
    theirs.close()
    found = {"result": "timeout", "why": f"not done after {seconds:.0f} s"}
    try:
        if ours.poll(seconds):
            found = ours.recv()
    except EOFError:
        found = {"result": "not built", "why": "its process ended"}
    if process.is_alive():
        process.join(2)
        process.kill()
    process.join()
    return {"type": model_type, **found, "seconds": round(time.monotonic() - started, 1)}


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {row["type"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def sweep(types: Iterable[str], path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for model_type in types:
        found = swept(model_type, seconds)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{model_type}: {found['result']} {found['why'][:160]} ({found['seconds']} s)", flush=True)


# ---- the page ----

HEADER = """\
# Model types

Every type that transformers {version} builds as a causal, a sequence-to-sequence or a multimodal language model,
{count} in all, as a tiny random model from its own configuration, edited once without an editor.

{summary}

- **exact**: the edit changes the target's probability, an undo restores the logits bit for bit, the factors give
  autograd's gradient, and in a batch each row has the gradient that it has alone.
- **refused**: an error of this library says why the model cannot be edited.
- **no text**: the type does not go on with text alone, so that there is nothing to edit by a prompt.
- **not swept**: not tried, or transformers itself does not build or run a small model on text alone from the script's
  settings, or it takes too long, which says nothing about edits.

[architectures.md](architectures.md) lists the models that are tested further. This page is written by
`PYTHONPATH=tests python docs/sweep_model_types.py --results FILE`, from the results in FILE.

| type | result | edited layers of a block, or the reason |
|---|---|---|
"""


def page(results: dict[str, dict[str, Any]]) -> str:
    words = {"not built": "not swept", "timeout": "not swept", "failing": "**failing**"}
    rows, count = [], {}
    for name in all_types():
        found = results.get(name, {"result": "not built", "why": "not tried"})
        if name in NO_TEXT:
            found = {"result": "no text", "why": NO_TEXT[name]}
        result = words.get(found["result"], found["result"])
        count[result] = count.get(result, 0) + 1
        exact = found["result"] == "exact"
        why = ", ".join(f"`{layer}`" for layer in found["layers"]) if exact else found["why"].replace("|", "/")[:240]
        if exact and found["why"]:
            why += f" ({found['why']})"
        rows.append(f"| {name} | {result} | {why} |")
    parts = [f"{count.get(word, 0)} are {word}" for word in ("exact", "refused", "no text", "not swept", "**failing**")]
    summary = ", ".join(part for part in parts if not part.startswith("0 are **"))
    if not count.get("**failing**"):
        summary += ", none fails"
    header = HEADER.format(version=transformers.__version__, count=len(rows), summary=f"{summary}.")
    return "\n".join([header.rstrip("\n"), *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one a type, the last one counts")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of one type")
    parser.add_argument("--types", nargs="*", help="sweep these alone")
    parser.add_argument("--again", nargs="*", default=[], help="results (exact, failing, ...) that are swept again")
    arguments = parser.parse_args()
    done = read_results(arguments.results)
    types = arguments.types or [
        name
        for name in all_types()
        if name not in NO_TEXT and (name not in done or done[name]["result"] in arguments.again)
    ]
    sweep(types, arguments.results, arguments.seconds)
    PAGE.write_text(page(read_results(arguments.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
