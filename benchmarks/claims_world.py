"""The small world in which claims.py looks at the papers' claims: a model with two skills, the rules that judge them, training.

The skills are the demo's packing task ("pack three fruit for anna :"), which stands for chat, and sums of two digits ("add 3
and 5 :", answered "3 + 5 = 8"), which stand for reasoning. The model learns both from demonstrations of which a part is wrong.
Completions have four to six tokens, so log-ratios are a few nats and β is larger than the papers'.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bco_fast.cli import demo
from bco_fast.data.batch import collate
from bco_fast.data.dataset import FeedbackDataset, Item
from bco_fast.data.samplers import balancing_weights, mismatched, oversample
from bco_fast.data.tokenize import load_feedback
from bco_fast.losses import OBJECTIVES, RewardShift, sequence_logps
from bco_fast.models.patch import completion_logps, forward_logps, patch_model
from bco_fast.models.sampling import draw
from bco_fast.training.step import mismatched_log_ratios

MAX_LENGTH, NEW_TOKENS = 32, 8
DIGITS = range(10)


@dataclass(frozen=True)
class Scale:
    """How large everything is; the tests use a smaller one."""

    fine_tune_steps: int = 700
    steps: int = 120
    batch: int = 32
    """Completions of a step."""
    samples: int = 6
    """Completions that the fine-tuned model gives to each prompt, for the feedback."""
    prompts: int = 400
    held_out: int = 120
    """Prompts that policies are sampled on; no alignment sees them."""
    sums: int = 100
    evaluated: int = 4
    """Completions to each held-out prompt."""
    demonstrated: bool = False
    """Judge demonstrations instead: a model that has hardly been fine-tuned gets no thumbs up."""


@dataclass(frozen=True)
class Method:
    """An objective as a case of a claim trains it."""

    loss_type: str
    """Of `OBJECTIVES`, or nll+pll (Eq. 1 of BNF's paper)."""
    learning_rate: float
    settings: dict = field(default_factory=dict)
    """beta and other hyper-parameters, by keyword of the loss."""
    oversample: bool = False
    balance: bool = False
    """λ by class sizes (`desirable_weight="auto"`)."""
    shift_balanced: bool = True
    weighted_shift: bool = True
    steps: float = 1.0
    """Of `Scale.steps`."""


@dataclass(frozen=True)
class World:
    tokenizer: PreTrainedTokenizerFast
    model: LlamaForCausalLM
    prompts: list[str]
    held_out: list[str]
    sums: list[str]
    """Prompts of sums; of near-identical pairs the first 70 % are trained on."""
    feedback: list[dict] = field(default_factory=list)
    """The fine-tuned model's completions of `prompts`, with score and label."""


def sum_prompts() -> list[str]:
    return [f"add {a} and {b} :" for a in DIGITS for b in DIGITS]


def sum_answer(prompt: str, off: int = 0) -> str:
    _, a, _, b, _ = prompt.split()
    return f"{a} + {b} = {(int(a) + int(b) + off) % 19}"


def graded(prompt: str, completion: str) -> float:
    """Of a packing prompt: things of the right kind as a share of those asked for, or given if they are more; in [0, 1]."""
    _, number, kind, *_ = prompt.split()
    words = completion.split()
    right = sum(word in demo.THINGS[kind].split() for word in words)
    return min(right, demo.NUMBERS[number]) / max(demo.NUMBERS[number], len(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    known = demo.build_tokenizer().get_vocab()
    words = [*sorted(known, key=known.get), "add", "and", "+", "=", *map(str, range(19))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=demo.UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": demo.EOS, "pad_token": demo.PAD, "unk_token": demo.UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def start(seed: int, scale: Scale) -> World:
    """The fine-tuned model, which is the reference, and its prompts."""
    rng = random.Random(seed)  # noqa: S311
    prompts, sums = demo.all_prompts(), sum_prompts()
    rng.shuffle(prompts)
    rng.shuffle(sums)
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config))
    rows = [(p, demo.demonstration(p, rng)) for p in prompts[120:] for _ in range(3)]
    rows += [(p, sum_answer(p, rng.choice((0, 0, 0, 0, 1, -1)))) for p in sums for _ in range(20)]
    rows = [{"prompt": p, "completion": c, "label": True} for p, c in rows]
    data = load_feedback(rows, tokenizer, max_length=MAX_LENGTH, progress=False)
    method = Method("sft", 3e-3, steps=scale.fine_tune_steps / scale.steps)
    train(model, data, method, scale, seed)
    model.eval()
    world = World(tokenizer, model, prompts[120 : 120 + scale.prompts], prompts[: scale.held_out], sums[: scale.sums])
    world.feedback.extend(_judged(world, scale, seed))
    return world


def completions(world: World, model, prompts: Sequence[str], seed: int, *, greedy: bool = False) -> list[str]:
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": world.tokenizer.pad_token_id, "do_sample": not greedy}
    encoded = world.tokenizer(list(prompts))["input_ids"]
    options |= {} if greedy else {"top_k": 0}
    drawn = draw(model, encoded, range(len(encoded)), options, batch_size=512, seed=seed)
    return world.tokenizer.batch_decode(drawn, skip_special_tokens=True)


def _judged(world: World, scale: Scale, seed: int) -> list[dict]:
    """The fine-tuned model's completions of its prompts with their score and thumb."""
    prompts = world.prompts * scale.samples
    rng = random.Random(seed)  # noqa: S311
    drawn = (
        [demo.demonstration(p, rng) for p in prompts]
        if scale.demonstrated
        else completions(world, world.model, prompts, 1000 + seed)
    )
    made = zip(prompts, drawn, strict=True)
    return [
        {"prompt": p, "completion": c, "score": graded(p, c), "label": demo.deserves_thumbs_up(p, c)}
        for p, c in made
        if c.strip()
    ]


def pairs(rows: Sequence[dict]) -> list[dict]:
    """For each prompt the completions of highest and lowest score, with their scores; prompts without a difference are left
    out."""
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    ranked = [sorted(group, key=lambda row: row["score"]) for group in by_prompt.values()]
    return [
        {"prompt": g[0]["prompt"], "chosen": g[-1]["completion"], "rejected": g[0]["completion"], "scores": (g[-1]["score"], g[0]["score"])}
        for g in ranked
        if g[-1]["score"] > g[0]["score"]
    ]  # fmt: skip


def dataset(world: World, rows: Sequence[dict], loss_type: str, **options) -> FeedbackDataset:
    """Rows as tokens with the reference's log-probabilities."""
    needs = OBJECTIVES[loss_type].data if loss_type in OBJECTIVES else "pairs"
    data = load_feedback(rows, world.tokenizer, needs=needs, max_length=MAX_LENGTH, progress=False, **options)
    if loss_type == "kto":
        data.mismatched = _with_reference(world, mismatched(data, max_length=MAX_LENGTH))
    return _with_reference(world, data)


@torch.no_grad()
def _with_reference(world: World, data: FeedbackDataset) -> FeedbackDataset:
    data.ref_token_logps, pad = [], world.tokenizer.pad_token_id
    for begin in range(0, len(data.examples), 512):
        batch = collate([Item(e) for e in data.examples[begin : begin + 512]], pad)
        cuts = batch["cu_completions"][1:-1].long()
        data.ref_token_logps += [part.numpy() for part in completion_logps(world.model, batch).tensor_split(cuts)]
    data.ref_logps = np.array([values.sum(dtype=np.float64) for values in data.ref_token_logps])
    return data


def align(
    world: World, data: FeedbackDataset, method: Method, scale: Scale, seed: int
) -> tuple[LlamaForCausalLM, list]:
    """-> (the trained policy, what each step logged)."""
    policy = copy.deepcopy(world.model)
    if method.oversample:
        data = _with_reference(world, oversample(data, seed))
    log = train(policy, data, method, scale, seed)
    return policy.eval(), log


def train(model, data: FeedbackDataset, method: Method, scale: Scale, seed: int) -> list[dict]:
    """AdamW, a linear schedule with a tenth of warm-up, gradients of norm 1 at most."""
    steps, items = max(round(scale.steps * method.steps), 1), scale.batch // (1 + data.paired)
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.learning_rate, weight_decay=0.0)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(steps - warm, 1))
    )
    shift = RewardShift(
        "ema" if OBJECTIVES.get(method.loss_type, OBJECTIVES["sft"]).shift == "ema" else "fixed",
        balanced=method.shift_balanced,
    )
    labels = [example.label for example in data.examples]
    class_weights = balancing_weights(labels) if method.balance else (1.0, 1.0)
    generator, order, log = torch.Generator().manual_seed(seed), [], []
    model.train()
    for _ in range(steps):
        while len(order) < items:
            order += torch.randperm(len(data), generator=generator).tolist()
        chosen, order = order[:items], order[items:]
        loss, entry = step_loss(model, collate([data[i] for i in chosen], 1), method, shift, class_weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        shift.step()
        log.append(entry)
    return log


def step_loss(model, batch, method: Method, shift: RewardShift, class_weights) -> tuple[torch.Tensor, dict]:
    """The loss of one step, and what is logged of it."""
    if method.loss_type == "nll+pll":
        chosen, rejected = sequence_logps(completion_logps(model, batch), cu_seqlens=batch["cu_completions"]).chunk(2)
        return (rejected - chosen).mean(), {}
    objective = OBJECTIVES[method.loss_type]
    head = forward_logps(model, batch, return_entropy=objective.per_token)
    entry, z_ref = {}, None
    if objective.mismatched:
        with torch.no_grad():
            z_ref = mismatched_log_ratios(model, batch).mean().float()
        entry["z_ref"] = float(z_ref.clamp(min=0))
    out = objective.run(head.logps, batch, method.settings, entropy=head.entropy, z_ref=z_ref, shift=shift, class_weights=class_weights)  # fmt: skip
    if objective.shift:
        shift.observe(out.rewards, batch["label"], out.weight if method.weighted_shift else None)
        entry["delta"] = float(shift.value)
    loss = (out.per_example * objective.weights(batch, batch["counts"], class_weights=class_weights)).sum()
    if objective.reference:
        found = out.metrics
        entry["error_term"] = float(found["error_term"])
        entry["kl"] = (
            -0.5 * float(found["rewards/chosen"] + found["rewards/rejected"]) / method.settings.get("beta", 1.0)
        )
    return loss, entry


def quality(world: World, model, prompts: Sequence[str], scale: Scale, seed: int) -> dict[str, float]:
    """Of sampled completions to packing prompts: the share that deserves a thumbs up, and the mean graded score."""
    prompts = list(prompts) * scale.evaluated
    made = list(zip(prompts, completions(world, model, prompts, 2000 + seed), strict=True))
    good = sum(demo.deserves_thumbs_up(p, c) for p, c in made) / len(made)
    return {"good": good, "score": sum(graded(p, c) for p, c in made) / len(made)}


def sums_right(world: World, model, prompts: Sequence[str]) -> float:
    """Share of sums answered right, greedily."""
    made = completions(world, model, prompts, 0, greedy=True)
    return sum(c == sum_answer(p) for p, c in zip(prompts, made, strict=True)) / len(made)
