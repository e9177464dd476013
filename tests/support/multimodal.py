"""Tiny models that read text beside images or sound, and prompts of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from support.models import VOCAB, initialize


_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION}
_CLIP = {"model_type": "clip_vision_model", **_VISION}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_VISION = {"depth": 4, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_IMAGE = 150  # a token of the vocabulary that no text of the tests has


def _qwen(name: str, vision: dict[str, Any], **text: Any) -> Any:
    config = getattr(transformers, f"{name}Config")
    return config(
        text_config={**_TEXT, **text, "rope_parameters": _ROPE}, vision_config={**_QWEN_VISION, **vision},
        image_token_id=_IMAGE, video_token_id=151, vision_start_token_id=152, vision_end_token_id=153,
    )  # fmt: skip


# Name -> its configuration, and the number of tokens of an image (or a piece of sound).
CONFIGS: dict[str, tuple[Callable[[], Any], int]] = {
    "Gemma3": (lambda: transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 8}, vision_config=_VISION, mm_tokens_per_image=1,
        image_token_index=_IMAGE), 1),
    "Llava": (lambda: transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT}, vision_config=_CLIP, image_token_index=_IMAGE), 4),
    "PaliGemma": (lambda: transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 8, **_TEXT}, vision_config=_SIGLIP | {"projection_dim": 32},
        image_token_index=_IMAGE, projection_dim=32), 4),
    "Idefics3": (lambda: transformers.Idefics3Config(
        text_config={"model_type": "llama", **_TEXT}, vision_config=_VISION, image_token_id=_IMAGE,
        scale_factor=2), 1),
    "Qwen2VL": (lambda: _qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}), 1),
    "Qwen3VL": (lambda: _qwen(
        "Qwen3VL", {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [1, 2]}, head_dim=8), 1),
    "Qwen2Audio": (lambda: transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **_TEXT}, audio_token_index=_IMAGE, audio_config={
            "num_mel_bins": 8, "d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
            "max_source_positions": 8}), 4),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(CONFIGS[name][0]())
    return initialize(model.eval())


def beside(name: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Arguments of a prompt with an image, or with a piece of sound, before some tokens of text."""
    torch.manual_seed(7)
    ids = torch.tensor([[1, *[_IMAGE] * CONFIGS[name][1], 20, 30, 40, 50]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "Qwen2Audio":
        return {**inputs, "input_features": torch.randn(1, 8, 16), "feature_attention_mask": torch.ones(1, 16)}
    if name.startswith("Qwen"):
        grid = torch.tensor([[1, 2, 2]])
        types = (ids == _IMAGE).int()
        return {**inputs, "pixel_values": torch.randn(4, 3 * 2 * 14 * 14), "image_grid_thw": grid,
                "mm_token_type_ids": types}  # fmt: skip
    pixels = torch.randn(1, 3, 28, 28)
    if name == "Gemma3":
        inputs["token_type_ids"] = (ids == _IMAGE).int()
    return {**inputs, "pixel_values": pixels[None] if name == "Idefics3" else pixels}
