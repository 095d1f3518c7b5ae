"""`bco-fast plan`: what a step takes, which switches make it fit, and the command to run. No weights are read."""

from __future__ import annotations

import copy
import itertools
import os

from . import common

FIELDS = (
    "max_length", "use_peft", "lora_r", "lora_target_modules", "lora_modules_to_save", "load_in_4bit", "load_in_8bit", "model_dtype",
    "bf16", "fp16", "optim", "per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_batch", "workspace_bytes",
    "gradient_checkpointing", "layer_chunk_tokens", "mlp_chunk_tokens", "activation_offloading", "layer_checkpoints", "attn_implementation",
)  # fmt: skip
STEP = {"per_device_train_batch_size": 1, "activation_checkpointing": None, "lora_alpha": 64, "lora_dropout": 0.0}
"""Defaults of a step that is counted, beside those of FIELDS."""
NAMES = {"forward": "forward", "head": "the head", "layer": "one layer's recomputation", "ends": "embeddings"}
POINTS = 5


def plan(arguments: list[str]) -> dict:
    from ..training.config import FeedbackConfig
    from ..training.values import check_numbers

    parser = common.Parser(prog="bco-fast plan", description=__doc__)
    parser.add_argument(
        "--model", required=True, help="folder of a causal language model, its config.json, or a Hub name"
    )
    parser.add_argument("--gpu_memory", type=float, help="of the GPU, GB (10^9 bytes); default: this machine's")
    parser.add_argument("--host_memory", type=float, help="for what is offloaded, GB (default: no limit)")
    parser.add_argument("--plot", metavar="FILE", help="picture of memory against context, PNG or SVG (default: none)")
    common.add_code_option(parser)
    common.add_fields(parser, FeedbackConfig, FIELDS)
    parser.set_defaults(**STEP)
    options = parser.parse_args(arguments)
    with common.usage_errors(ValueError):
        check_numbers(options)
    if (options.load_in_4bit or options.load_in_8bit) and not options.use_peft:
        raise common.UsageError(
            "quantised weights cannot be trained themselves: --load_in_4bit and --load_in_8bit need --use_peft"
        )
    if options.plot:
        common.check_output("--plot", options.plot)
    config, budget = model_config(options), _gpu_bytes(options.gpu_memory)

    from ..models.plan import USABLE, longest, stages, with_all, with_fewest_checkpoints

    rows, tokens = options.per_device_train_batch_size, options.max_length
    if options.tokens_per_batch is not None:
        rows, tokens = 1, options.tokens_per_batch
    where, limits = {"rows": rows}, {"rows": rows, "host": _host_bytes(options.host_memory)}
    with common.usage_errors(ValueError, prefix=f"--model {options.model}: "):
        made = list(stages(config, options, tokens, USABLE * budget, **limits))
        stage, chosen = made[-1]
        fits = longest(config, chosen, USABLE * budget, **limits)
        every = [with_all(chosen)]
        if options.host_memory is not None and not chosen.activation_offloading:
            every.append(with_fewest_checkpoints(config, chosen))
        most = max(longest(config, switched, USABLE * budget, **limits) for switched in every)
        if options.plot:
            _plot(options.plot, config, chosen, budget, max(most, tokens), where)
    command = _command(options, chosen)
    ok = stage.memory.total <= USABLE * budget and stage.memory.host <= limits["host"]
    _print(ok, made, options, tokens, budget, (fits, most), config, command)
    memory = stage.memory
    return {
        "model": options.model,
        "tokens": rows * tokens,
        "fits": ok,
        "longest": fits,
        "longest_with_every_switch": most,
        "gpu_gb": round(budget / 1e9, 2),
        "step_gb": round(memory.total / 1e9, 3),
        "host_gb": round(memory.host / 1e9, 3),
        "moment": memory.moment,
        "parts_gb": {name: round(size / 1e9, 3) for name, size in memory.parts.items()},
        "switches": [
            {
                "option": now.switch.option,
                "value": now.switch.value,
                "saves_gb": round((before.memory.total - now.memory.total) / 1e9, 3),
                "cost": now.switch.cost,
            }
            for (before, _), (now, _) in itertools.pairwise(made)
        ],
        "command": command,
    }


def model_config(options):
    """The config of --model, without its weights."""
    from transformers import AutoConfig

    from ..models.load import code_options

    with common.usage_errors(Exception, prefix=f"--model {options.model}: "):
        if not os.path.exists(options.model) and (os.path.isabs(options.model) or options.model.startswith(".")):
            raise ValueError("no such folder or file")
        return AutoConfig.from_pretrained(options.model, **code_options(options.model, options.trust_remote_code))


def _gpu_bytes(given: float | None) -> float:
    import torch

    if given is not None:
        if not 0 < given < float("inf"):
            raise common.UsageError(f"--gpu_memory must be > 0, not {given}")
        return given * 1e9
    if not torch.cuda.is_available():
        raise common.UsageError(
            "--gpu_memory is missing, and this machine has no GPU to ask: give its GB, as in --gpu_memory 80"
        )
    return float(torch.cuda.mem_get_info()[1])


def _host_bytes(given: float | None) -> float:
    if given is None:
        return float("inf")
    if not 0 < given < float("inf"):
        raise common.UsageError(f"--host_memory must be > 0, not {given}")
    return given * 1e9


def _command(given, chosen) -> str:
    """The command line that trains with these options."""
    from ..training.config import FeedbackConfig

    fields = FeedbackConfig.__dataclass_fields__
    words = ["bco-fast train --model", given.model, "--data FILE --output_dir DIR"]
    for name in FIELDS:
        value = getattr(chosen, name)
        value = getattr(value, "value", value)
        if value not in (fields[name].default, None, False):
            words.append(f"--{name} {str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


def _print(ok: bool, made, options, tokens: int, budget: float, fits: tuple[int, int], config, command: str) -> None:
    stage, _ = made[-1]
    rows = 1 if options.tokens_per_batch else options.per_device_train_batch_size
    print(f"A step of {rows} x {tokens:,} tokens on {budget / 1e9:.0f} GB, at its fullest moment:\n")
    for name, size in stage.memory.parts.items():
        print(f"  {NAMES.get(name, name):28}{size / 1e9:10.2f} GB")
    print(f"  {'together':28}{stage.memory.total / 1e9:10.2f} GB")
    if stage.memory.host:
        print(f"  {'host memory':28}{stage.memory.host / 1e9:10.2f} GB")
    print()
    for (before, _), (now, _) in itertools.pairwise(made):
        saved = (before.memory.total - now.memory.total) / 1e9
        print(
            f"  --{now.switch.option} {str(now.switch.value).lower()} saves {saved:.2f} GB; it costs {now.switch.cost}"
        )
    if len(made) > 1:
        print()
    if not ok:
        print(f"  That does not fit. {_more(options)}")
    for length, which in zip(fits, ("these switches", "every switch"), strict=True):
        print(f"  Longest context with {which}: {length:,} tokens{_positions(config, length)}")
    print()
    print(f"  {command}\n", flush=True)


def _more(options) -> str:
    if not options.use_peft:
        return "Smaller: --use_peft true; --optim adamw_8bit; --model_dtype bfloat16; or more GPUs (docs/memory.md)."
    if not options.load_in_4bit:
        return "Smaller: --load_in_4bit true, or more GPUs (docs/memory.md)."
    return "Use a shorter --max_length, or more GPUs (docs/memory.md)."


def _positions(config, fits: int) -> str:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return f" (the model has {most:,} positions)" if most and fits > most else ""


def _plot(path: str, config, options, budget: float, most: int, where: dict) -> None:
    """Stacked areas of the parts against the context, and the GPU's memory as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from ..models.count import count_step

    contexts = [max(2, round(most * (1 + i) / POINTS)) for i in range(POINTS)]
    memories = [count_step(config, copy.copy(options), tokens, **where) for tokens in contexts]
    names = ["weights", "optimizer", "gradients", "checkpoints"]
    heights = [[memory.parts[name] / 1e9 for memory in memories] for name in names]
    heights.append([memory.parts[memory.moment] / 1e9 for memory in memories])
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.stackplot(contexts, heights, labels=[*names, "one layer, or the head"])
    axes.axhline(budget / 1e9, color="black", linestyle="--", label="GPU")
    axes.set(xlabel="context, tokens", ylabel="GB", xlim=(contexts[0], contexts[-1]))
    axes.legend(loc="upper left")
    figure.savefig(path)
    plt.close(figure)
