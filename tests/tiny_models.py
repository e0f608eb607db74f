"""Tiny random models of every causal language model that the installed transformers registers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 61
SMALL = {
    VOCAB: ("vocab_size", "vocab_size_per_layer_input"),
    32: ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embed_dim", "dim", "rnn_hidden_size"),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers",
        "depth", "num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num", "rotary_dim",
    ),
    48: (
        "intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "d_inner",
        "moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "ffn_hidden_size",
    ),
    1: (
        "n_group", "topk_group", "n_shared_experts", "num_shared_experts", "num_nextn_predict_layers", "bos_token_id",
        "decoder_start_token_id", "forced_bos_token_id",
    ),
    64: ("max_position_embeddings", "n_positions", "max_seq_len", "context_length"),
    8: (
        "q_lora_rank", "kv_lora_rank", "lora_rank", "head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
        "d_kv", "hidden_size_per_layer_input", "global_head_dim", "index_head_dim",
    ),
}  # fmt: skip
"""Sizes, and what configurations call the things that get them."""
SIZES: dict[str, Any] = {
    **{name: size for size, names in SMALL.items() for name in names},
    **dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), 0.2),
    **{"pad_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2, "is_decoder": True},
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "minicpm3": {"dim_model_base": 20},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA,
    "kimi_linear": {"num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "chunk_size": 8, "n_groups": 1},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 16},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": HYBRID,
    "zamba2": {**HYBRID, "mamba_d_state": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the sizes alone do not settle."""
LARGEST = 4_000_000


def model_types() -> list[str]:
    """Lists every registered type, one a class: where a class serves several, the type of text alone."""
    of_class: dict[str, str] = {}
    for name, model_class in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if model_class not in of_class or name.endswith("_text"):
            of_class[model_class] = name
    return sorted(of_class.values())


def tiny_config(kind: type[PreTrainedConfig], **overrides: Any) -> Any:
    """Builds a configuration whose sizes are small, and those of its parts."""
    default = kind()
    sizes = {name: SIZES[name] for name, value in default.to_dict().items() if _is_set(name, value)}
    if {"kv_lora_rank", "num_key_value_heads"} <= sizes.keys():  # latent attention has one key for each query head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in kind.sub_configs or ():
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig) and name not in overrides:
            sizes[name] = tiny_config(type(part), **OVERRIDES.get(part.model_type, {}))
    return kind(**{**sizes, **overrides})


def tiny_model(name: str) -> Any:
    """Builds a random float32 model in evaluation mode.

    Raises:
        ValueError: if it is not tiny, and whatever a model raises that these settings do not suit.
    """
    config = tiny_config(CONFIG_MAPPING[name], **OVERRIDES.get(name, {}))
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size} parameters")
    return AutoModelForCausalLM.from_config(config).float().eval()


def _is_set(name: str, value: Any) -> bool:
    return name in SIZES and (value is not None or name == "head_dim")
