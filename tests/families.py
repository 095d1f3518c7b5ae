"""Configurations of the model families that the tests run."""

import torch
import transformers
from tiny import TINY, build_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4Config,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)

Gemma4Config = getattr(transformers, "Gemma4Config", None)  # transformers 4 has none

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8}),
    "phi3": (Phi3Config, {}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),
    "gptj": (GPTJConfig, {**GPT, "n_inner": 48, "n_positions": 64, "rotary_dim": 4}),
    "phi2": (PhiConfig, {}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "gpt2": (GPT2Config, {**GPT, "n_positions": 64}),
    "mixtral": (MixtralConfig, {**MOE, "output_router_logits": True}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
}


_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGHT = {**_TOWER, "image_size": 16, "patch_size": 8}
_QWEN_SIGHT = {"depth": 1, "num_heads": 2, "patch_size": 4}
_QWEN_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
_GEMMA_TOKENS = {"boi_token_id": 4, "eoi_token_id": 5}


def _mrope(*sections):
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e4}


MULTIMODAL = {  # config, options of its language model, its vision tower, and of itself
    "gemma3": (Gemma3Config, {"sliding_window": 8}, _SIGHT, {"mm_tokens_per_image": 1, "image_token_index": 3}),
    "qwen2_vl": (
        Qwen2VLConfig, {"rope_parameters": _mrope(1, 1, 2)}, {**_QWEN_SIGHT, "embed_dim": 16, "hidden_size": 32}, _QWEN_TOKENS
    ),
    "qwen3_vl": (
        Qwen3VLConfig, {"rope_parameters": _mrope(2, 1, 1)},
        {**_QWEN_SIGHT, **_TOWER, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}, _QWEN_TOKENS,
    ),
    "mistral3": (
        Mistral3Config, {"model_type": "mistral"}, {**_SIGHT, "model_type": "pixtral", "head_dim": 8}, {"image_token_index": 3}
    ),
    "llama4": (
        Llama4Config, {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
        {**_SIGHT, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16}, {"image_token_index": 3},
    ),
    "gemma4": (
        Gemma4Config,
        {"sliding_window": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "layer_types": ["sliding_attention", "full_attention"]},
        {**_TOWER, "num_key_value_heads": 2, "head_dim": 8}, {"audio_config": None, "image_token_id": 3, **_GEMMA_TOKENS},
    ),
}  # fmt: skip
if Gemma4Config is None:
    del MULTIMODAL["gemma4"]


def multimodal(family, std=0.2):
    """A checkpoint that also reads images, as transformers loads it."""
    config_class, text, vision, options = MULTIMODAL[family]
    vocabulary = len(build_tokenizer())
    text = {"vocab_size": vocabulary, "head_dim": 8, "vocab_size_per_layer_input": vocabulary} | TINY | text
    torch.manual_seed(0)
    config = config_class(text_config=text, vision_config=vision, **options)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model
