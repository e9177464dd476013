"""Tiny configurations of the architectures on which the library is tested end to end."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from support.models import initialize


_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_BART = {
    "d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_HEAD = {**_LLAMA, "head_dim": 8}
_MOE = {**_HEAD, "moe_intermediate_size": 24, "num_experts_per_tok": 2}

# Name -> (model_type, settings). Flan-T5 and T5 v1.1 are the gated T5.
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _HEAD),
    "gemma2": ("gemma2", {**_HEAD, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3_text": ("gemma3_text", {**_HEAD, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "mistral": ("mistral", _LLAMA),
    "phi": ("phi", _LLAMA),
    "phi3": ("phi3", {**_LLAMA, "pad_token_id": 0, "original_max_position_embeddings": 64}),
    "olmo2": ("olmo2", _LLAMA),
    "granite": ("granite", _LLAMA),
    "stablelm": ("stablelm", _LLAMA),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64}),
    "opt": ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
                    "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neo": ("gpt_neo", {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64,
                            "attention_types": [[["global", "local"], 2]], "window_size": 16}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "codegen": ("codegen", {**_GPT2, "rotary_dim": 4, "n_ctx": 64}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "starcoder2": ("starcoder2", _LLAMA),
    "cohere": ("cohere", _LLAMA),
    "smollm3": ("smollm3", {**_LLAMA, "pad_token_id": 0}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "num_experts": 4}),
    "gpt_oss": ("gpt_oss", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "deepseek_v3": ("deepseek_v3", {**_LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 24,
                                    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
                                    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
                                    "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                                    "v_head_dim": 8}),
}  # fmt: skip
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "t5 (gated, flan and v1.1)": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "bart": ("bart", _BART),
    "mbart": ("mbart", _BART),
    "pegasus": ("pegasus", {**_BART, "decoder_start_token_id": 0}),
    "marian": ("marian", {**_BART, "decoder_start_token_id": 0}),
    "m2m_100": ("m2m_100", _BART),
    "led": ("led", {**{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
                    "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64,
                    "attention_window": 16}),
    "pegasus_x": ("pegasus_x", {**_BART, "decoder_start_token_id": 0, "block_size": 16, "num_global_tokens": 4}),
    "prophetnet": ("prophetnet", {
        "hidden_size": 32, "num_encoder_layers": 4, "num_decoder_layers": 4, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64, "decoder_start_token_id": 0}),
    "seamless_m4t": ("seamless_m4t", {
        "hidden_size": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "decoder_start_token_id": 2}),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    model_type, settings = {**CAUSAL, **SEQ2SEQ}[name]
    torch.manual_seed(0)
    tokens = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**tokens, **settings})
    auto: Any = AutoModelForCausalLM if name in CAUSAL else AutoModelForSeq2SeqLM
    return initialize(auto.from_config(config).eval())
