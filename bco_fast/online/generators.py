"""Sampling a round: by the policy itself, or by a vLLM engine that gets the policy's weights first.

generator(policy, prompts as token ids, seed) -> completions as token ids, one per prompt, EOS included where sampled
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..data.tokenizer import pad_or_eos
from ..models.sampling import draw

Generator = Callable[[nn.Module, Sequence[Sequence[int]], int], list[list[int]]]


class HuggingFaceGenerator:
    """`model.generate`, left-padded and in batches; the caller's random state is left as it was.

    Args:
        temperature: 0 for greedy decoding.
    """

    def __init__(
        self, tokenizer, *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, batch_size: int = 64
    ):
        self.eos, self.pad = tokenizer.eos_token_id, pad_or_eos(tokenizer)
        self.batch_size = batch_size
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        self.options = {"max_new_tokens": max_new_tokens, **(sampling if temperature else {"do_sample": False})}

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        # Longest first: prompts of similar length share a batch, and memory peaks in the first.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        options = {"pad_token_id": self.pad, "eos_token_id": self.eos, **self.options}
        drawn = draw(model, prompts, order, options, batch_size=self.batch_size, seed=seed)
        return [_until_eos(tokens, self.eos) for tokens in drawn]


def _until_eos(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


class VllmGenerator:
    """A vLLM engine in this process and on this GPU, asleep while the policy trains.

    Each call wakes the engine, copies the policy's weights into it (with a LoRA adapter merged into its base), samples, and
    puts it to sleep again, which drops weights and KV cache. On several ranks each has its own engine.

    Tested against a stand-in for vLLM, not yet against vLLM on a GPU. It follows vLLM's LLM, SamplingParams,
    collective_rpc, sleep mode and external launcher, as versions 0.22 to 0.31 document them.

    Args:
        model: the policy's folder or Hub name: the architecture, and the dtype that the engine computes in.
        max_length: tokens of prompt and completion together.
        temperature: 0 for greedy decoding.
        gpu_memory_utilization: share of the GPU's memory that the engine takes while awake, (0, 1].

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        tokenizer,
        *,
        max_length: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        gpu_memory_utilization: float = 0.3,
    ):
        try:
            import vllm
        except ImportError:
            raise ImportError("generator vllm needs the package vllm, and a GPU: pip install vllm") from None
        self.eos = tokenizer.eos_token_id
        self._params = vllm.SamplingParams
        self.options = {"n": 1, "temperature": temperature, "top_p": top_p, "top_k": 0, "max_tokens": max_new_tokens}
        self.options |= {"stop_token_ids": [self.eos], "detokenize": False}
        # The engine joins the training's process group; a single process is a group of one.
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29555}.items():  # fmt: skip
            os.environ.setdefault(name, str(value))
        self.engine = vllm.LLM(
            model=model,
            max_model_len=max_length,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_sleep_mode=True,
            distributed_executor_backend="external_launcher",
            worker_extension_cls=f"{PolicyWeights.__module__}.{PolicyWeights.__name__}",
            generation_config="vllm",  # without the checkpoint's top-k and penalties
            seed=0,
        )
        self.engine.sleep(level=2)

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc("load_policy", args=(policy_weights(model),))
        self.engine.wake_up(tags=["kv_cache"])
        self.engine.reset_prefix_cache()
        # One seed for each prompt: with a common one, samples of the same prompt would be identical.
        seeds = random.Random(seed)  # noqa: S311 - sampling, not a secret
        params = [self._params(**self.options, seed=seeds.getrandbits(31)) for _ in prompts]
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.engine.generate(asked, sampling_params=params, use_tqdm=False)
        self.engine.sleep(level=2)
        return [_until_eos(list(output.outputs[0].token_ids), self.eos) for output in outputs]


class PolicyWeights:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    def load_policy(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.model_runner.model.load_weights(weights=weights)


@torch.no_grad()
def policy_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a policy, one at a time, under the name its checkpoint has; a tied one once.

    A LoRA adapter is added to a copy of each weight: merging in place and back would round the base each time.

    Raises:
        ValueError: the policy is quantised or sharded, or its adapter is not plain LoRA.
    """
    for adapter in getattr(policy, "peft_config", {}).values():
        if str(getattr(adapter.peft_type, "value", adapter.peft_type)) != "LORA" or adapter.use_dora:
            raise ValueError(f"vLLM gets plain LoRA adapters folded into the base, not {adapter.peft_type}")
    base = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    for name, parameter in base.named_parameters():
        path, _, _ = name.rpartition(".")
        parts = name.split(".")
        if "original_module" in parts or any(part.startswith("lora_") for part in parts):
            continue
        if not parameter.is_floating_point() or hasattr(parameter, "full_tensor"):
            kind = "sharded" if hasattr(parameter, "full_tensor") else "quantised"
            raise ValueError(f"{name} is {kind}: vLLM can be given whole floating-point weights only")
        weight = parameter
        if path.endswith(".base_layer") and parts[-1] == "weight":
            layer = base.get_submodule(path.removesuffix(".base_layer"))
            for adapter in layer.active_adapters:
                if adapter in layer.scaling:
                    weight = weight + layer.get_delta_weight(adapter).to(weight)
        yield _checkpoint_name(parts), weight


def _checkpoint_name(parts: list[str]) -> str:
    """A parameter's name without what PEFT puts into it."""
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(part for part in parts if part != "base_layer")
