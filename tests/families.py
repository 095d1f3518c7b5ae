"""Configurations of the model families that the tests run."""

from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

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
