"""`bco-fast demo`: the whole method on a model built from a seed: demonstrations, thumbs, alignment, before and after.

The task: "pack three fruit for anna :" asks for three fruits and nothing else. Only half of the demonstrations that the
model first learns from are right, as in scraped data, so it learns the format and the mistakes. A rule then judges the
model's own completions, and BCO sees nothing but those thumbs.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..data.batch import collate
from ..data.tokenize import load_feedback
from ..losses.sequence import sequence_logps
from ..models.patch import completion_logps, patch_model
from ..models.sampling import draw
from ..training.config import FeedbackConfig
from .common import Parser, UsageError, check_writable
from .train import run_training

THINGS = {
    "fruit": "apple pear plum cherry mango lemon grape peach",
    "tools": "hammer saw drill wrench chisel pliers file level",
    "animals": "cat dog horse goat sheep duck mouse rabbit",
    "clothes": "shirt socks coat scarf gloves hat boots belt",
    "drinks": "water tea coffee milk juice cocoa soda cider",
    "books": "atlas novel diary comic bible poems cookbook almanac",
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
VERBS = ("pack", "bring", "list", "choose", "fetch")
NAMES = ("anna", "ben", "carla", "david", "emma", "felix", "grace", "henry")
ONLINE_BETA, ONLINE_LEARNING_RATE = 0.5, 3e-4
EOS, PAD, UNKNOWN = "</s>", "<pad>", "<unk>"


def all_prompts() -> list[str]:
    return [f"{v} {n} {t} for {w} :" for v in VERBS for n in NUMBERS for t in THINGS for w in NAMES]


def deserves_thumbs_up(prompt: str, completion: str) -> bool:
    """The rule: as many things as asked for, and all of the kind asked for."""
    _, number, kind, *_ = prompt.split()
    words = completion.split()
    return len(words) == NUMBERS[number] and set(words) <= set(THINGS[kind].split())


def demonstration(prompt: str, rng: random.Random) -> str:
    """Right half of the time; else with a thing of another kind, or one too few or too many."""
    _, number, kind, *_ = prompt.split()
    words = rng.choices(THINGS[kind].split(), k=NUMBERS[number])
    slip = rng.choice(("none", "none", "foreign", "count"))
    if slip == "foreign":
        other = rng.choice([k for k in THINGS if k != kind])
        words[rng.randrange(len(words))] = rng.choice(THINGS[other].split())
    elif slip == "count":
        words = words[:-1] if rng.random() < 0.5 else words + rng.choices(THINGS[kind].split())
    return " ".join(words)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [EOS, PAD, UNKNOWN, ":", "for", *VERBS, *NUMBERS, *THINGS, *NAMES]
    words += [word for things in THINGS.values() for word in things.split()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN, padding_side="left"
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fine_tune(
    model, tokenizer, prompts: list[str], rng: random.Random, *, steps: int = 250, batch_size: int = 64
) -> None:
    """Maximum likelihood on demonstrations, with the fused head."""
    patch_model(model)
    rows = [{"prompt": p, "completion": demonstration(p, rng), "label": True} for p in prompts for _ in range(4)]
    dataset = load_feedback(rows, tokenizer)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        sampler=torch.utils.data.RandomSampler(dataset, num_samples=steps * batch_size),
        collate_fn=functools.partial(collate, pad_token_id=tokenizer.pad_token_id),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for batch in tqdm(loader, desc="fine-tune"):
        logps = completion_logps(model, batch)
        loss = -sequence_logps(logps, cu_seqlens=batch["cu_completions"], reduction="mean").mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def sample(model, tokenizer, prompts: list[str], seed: int, *, batch_size: int = 256) -> list[str]:
    """One sampled completion per prompt, at temperature 1."""
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "pad_token_id": tokenizer.pad_token_id}
    encoded = tokenizer(prompts)["input_ids"]
    drawn = draw(model, encoded, range(len(prompts)), options, batch_size=batch_size, seed=seed)
    return tokenizer.batch_decode(drawn, skip_special_tokens=True)


@dataclass(frozen=True)
class Judged:
    rows: list[dict]

    @property
    def share(self) -> float:
        return sum(row["label"] for row in self.rows) / len(self.rows)

    def write(self, path: Path) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def judge(model, tokenizer, prompts: list[str], seed: int, *, samples: int) -> Judged:
    """Sample completions and judge each by the rule."""
    prompts = prompts * samples
    completions = sample(model, tokenizer, prompts, seed)
    rows = [
        {"prompt": p, "completion": c, "label": deserves_thumbs_up(p, c)}
        for p, c in zip(prompts, completions, strict=True)
        if c.strip()  # an empty completion cannot be trained on; the rule would call it bad
    ]
    return Judged(rows)


@dataclass(frozen=True)
class World:
    """The start of both demos: the model after its noisy demonstrations, and prompts that it has and has not seen."""

    tokenizer: PreTrainedTokenizerFast
    model: LlamaForCausalLM
    prompts: list[str]
    held_out: list[str]


def build_world(seed: int, *, fine_tune_steps: int = 250) -> World:
    rng = random.Random(seed)  # noqa: S311 - a demo, not a secret
    prompts = all_prompts()
    rng.shuffle(prompts)
    held_out, prompts = prompts[:120], prompts[120:]
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    fine_tune(model, tokenizer, prompts, rng, steps=fine_tune_steps)
    return World(tokenizer, model, prompts, held_out)


_TRAINING = {
    "max_length": 64,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    # Four tokens give log-ratios of a few nats, a paragraph hundreds; so beta is larger than the usual 0.1.
    "beta": 0.5,
    "warmup_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


def run(output_dir: Path, *, seed: int = 0, max_steps: int = 400) -> dict:
    """Everything, in order; -> the summary that the command line prints."""
    from ..evaluation.plots import plot_shift
    from ..evaluation.run_reading import load_run
    from ..evaluation.samples import PromptSamples

    start = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    _say("[1/4] fine-tune a small Llama, built from a seed, on noisy demonstrations")
    world = build_world(seed)
    tokenizer, model, prompts, held_out = world.tokenizer, world.model, world.prompts, world.held_out
    model.save_pretrained(output_dir / "sft")
    tokenizer.save_pretrained(output_dir / "sft")

    _say("[2/4] let it answer, give thumbs up and down by the rule")
    judge(model, tokenizer, prompts, seed + 1, samples=12).write(output_dir / "feedback.jsonl")
    judge(model, tokenizer, held_out, seed + 2, samples=4).write(output_dir / "held_out.jsonl")
    before = judge(model, tokenizer, held_out, seed + 3, samples=8).share

    _say("[3/4] reference log-probabilities once, then BCO")
    folders = {"output_dir": str(output_dir / "bco"), "cache_dir": str(output_dir / "cache")}
    config = FeedbackConfig(**_TRAINING, **folders, max_steps=max_steps, learning_rate=2e-4, logging_steps=5, seed=seed)
    files = (output_dir / name for name in ("feedback.jsonl", "held_out.jsonl"))
    datasets = [load_feedback(file, tokenizer, max_length=64) for file in files]
    samples = PromptSamples(held_out[:3], max_new_tokens=8)
    summary = run_training(model, tokenizer, config, *datasets, start=start, samples=samples)

    _say("[4/4] let it answer again, on prompts it was never trained on")
    after = judge(model, tokenizer, held_out, seed + 3, samples=8).share
    plot_shift(load_run(output_dir / "bco")).savefig(output_dir / "rewards.png", dpi=120)
    summary |= {"good_before": round(before, 4), "good_after": round(after, 4)}
    _finish(summary, start, output_dir)
    low, high = summary["held_out_auc_95"]
    _say(
        f"\n{'held-out prompts':34}{'before':>8}{'after':>8}\n"
        f"{'completions that deserve thumbs up':34}{before:8.1%}{after:8.1%}\n"
        f"{'reward margin':34}{0:8.2f}{summary['held_out_margin']:8.2f}\n"
        f"{'AUC of the reward':34}{0.5:8.2f}{summary['held_out_auc']:8.2f} [{low:.2f}, {high:.2f}]\n\n"
        f"{_three(samples.rows)}\n\n"
        f"plot: {output_dir / 'rewards.png'}    feedback: {output_dir / 'feedback.jsonl'}    model: {output_dir / 'bco'}"
    )
    return summary


def _three(rows: list[dict]) -> str:
    """The sample prompts with the first and the last completion of each."""
    said: dict[str, list[str]] = {}
    for row in rows:
        said.setdefault(row["prompt"], []).append(row["completion"])
    lines = [f"{prompt:44}  {answers[0]:30}  {answers[-1]}" for prompt, answers in said.items()]
    return "\n".join([f"{'most likely completions':44}  {'before':30}  after", *lines])


def rule_reward(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """The rule as a reward function: 1 for a completion that deserves a thumbs up, 0 for another."""
    return [float(deserves_thumbs_up(p, c)) for p, c in zip(prompts, completions, strict=True)]


def run_online(output_dir: Path, *, seed: int = 0, max_steps: int = 600) -> dict:
    """Offline BCO, then online UNA from the same model with the rule as its reward; -> both on held-out prompts."""
    from ..online.config import OnlineConfig
    from ..online.trainer import OnlineFeedbackTrainer

    start = time.perf_counter()
    offline = run(output_dir / "offline", seed=seed)
    _say("[online] sample, reward, una_score; the reference is the same fine-tuned model")
    world = build_world(seed)
    sampling = {"samples_per_prompt": 4, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0}
    options = _TRAINING | sampling | {"beta": ONLINE_BETA, "per_device_eval_batch_size": 512}
    config = OnlineConfig(
        **options,
        output_dir=str(output_dir / "online"),
        max_steps=max_steps,
        loss_type="una_score",
        steps_per_round=8,
        generation_batch_size=256,
        learning_rate=ONLINE_LEARNING_RATE,
        logging_steps=20,
        seed=seed,
    )
    shutil.rmtree(output_dir / "online", ignore_errors=True)
    trainer = OnlineFeedbackTrainer(world.model, config, world.prompts, rule_reward, processing_class=world.tokenizer)
    trainer.train()
    trainer.save_model(output_dir / "online")
    after = judge(world.model, world.tokenizer, world.held_out, seed + 3, samples=8).share
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry][-1]
    summary = {"good_before": offline["good_before"], "good_offline": offline["good_after"]}
    summary |= {"good_online": round(after, 4), "online_kl": round(kl, 3)}
    _finish(summary, start, output_dir)
    _say(
        f"\n{'held-out completions that deserve thumbs up':46}{'before':>8}{'offline BCO':>13}{'online UNA':>12}\n"
        f"{'':46}{summary['good_before']:8.1%}{summary['good_offline']:13.1%}{summary['good_online']:12.1%}"
    )
    return summary


def _finish(summary: dict, start: float, output_dir: Path) -> None:
    summary["seconds"] = round(time.perf_counter() - start, 1)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _say(text: str) -> None:
    print(text, flush=True)


def demo(arguments: list[str]) -> dict:
    description = "Build a tiny model, teach it from noisy demonstrations, then align it from thumbs up and down."
    parser = Parser(prog="bco-fast demo", description=description)
    parser.add_argument("--output_dir", default="runs/demo", help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the training")
    parser.add_argument("--online", action="store_true", help="afterwards online UNA on the policy's own completions")
    options = parser.parse_args(arguments)
    check_writable("--output_dir", options.output_dir)
    if not 0 <= options.seed < 2**31:
        raise UsageError(f"--seed must be in [0, 2^31), not {options.seed}")
    return (run_online if options.online else run)(Path(options.output_dir), seed=options.seed)
