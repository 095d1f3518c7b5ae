"""The whole story on a model that is built from a seed: demonstrations, thumbs, alignment, before and after.

The task: "pack three fruit for anna :" wants three fruits and nothing else. The demonstrations that the model
first learns from are right only half of the time, as scraped ones are, so it learns the format and the mistakes. Its
own completions are then judged by the rule, and BCO sees nothing but those thumbs.
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
from ..training.config import FeedbackConfig
from .common import _Parser
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
    """Right half of the time; else a thing of another kind, or one too few or too many."""
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


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], seed: int, *, batch_size: int = 256) -> list[str]:
    """One sampled completion per prompt, at temperature 1."""
    model.eval()
    torch.manual_seed(seed)
    completions = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=8,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new, skip_special_tokens=True)
    return completions


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
    # an empty completion cannot be trained on; the rule would call it bad
    rows = [
        {"prompt": p, "completion": c, "label": deserves_thumbs_up(p, c)}
        for p, c in zip(prompts, completions, strict=True)
        if c.strip()
    ]
    return Judged(rows)


@dataclass(frozen=True)
class World:
    """Where both demos start: the model after its noisy demonstrations, and prompts it has and has not seen."""

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


def run(output_dir: Path, *, seed: int = 0, max_steps: int = 400) -> dict:
    """Everything, in order; -> the summary that the command line prints."""
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
    config = FeedbackConfig(
        output_dir=str(output_dir / "bco"),
        cache_dir=str(output_dir / "cache"),
        max_length=64,
        max_steps=max_steps,
        # Four tokens make log-ratios of a few nats where a paragraph makes hundreds, so beta is above the usual 0.1.
        beta=0.5,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        learning_rate=2e-4,
        warmup_steps=10,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=seed,
    )
    train_set, eval_set = (
        load_feedback(output_dir / f, tokenizer, max_length=64) for f in ("feedback.jsonl", "held_out.jsonl")
    )
    summary = run_training(model, tokenizer, config, train_set, eval_set, start=start)

    _say("[4/4] let it answer again, on prompts it was never trained on")
    after = judge(model, tokenizer, held_out, seed + 3, samples=8).share
    history = json.loads((output_dir / "bco" / "trainer_state.json").read_text())["log_history"]
    plot(history, output_dir / "rewards.png")
    summary |= {
        "good_before": round(before, 4),
        "good_after": round(after, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _say(
        f"\n{'held-out prompts':34}{'before':>8}{'after':>8}\n"
        f"{'completions that deserve thumbs up':34}{before:8.1%}{after:8.1%}\n"
        f"{'reward margin':34}{0:8.2f}{summary['held_out_margin']:8.2f}\n"
        f"{'AUC of the reward':34}{0.5:8.2f}{summary['held_out_auc']:8.2f}\n\n"
        f"plot: {output_dir / 'rewards.png'}    feedback: {output_dir / 'feedback.jsonl'}    model: {output_dir / 'bco'}"
    )
    return summary


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
    config = OnlineConfig(
        output_dir=str(output_dir / "online"),
        max_length=64,
        max_steps=max_steps,
        loss_type="una_score",
        beta=ONLINE_BETA,
        steps_per_round=8,
        samples_per_prompt=4,
        max_new_tokens=8,
        temperature=1.0,
        top_p=1.0,
        generation_batch_size=256,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=512,
        learning_rate=ONLINE_LEARNING_RATE,
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=seed,
    )
    shutil.rmtree(output_dir / "online", ignore_errors=True)
    trainer = OnlineFeedbackTrainer(world.model, config, world.prompts, rule_reward, processing_class=world.tokenizer)
    trainer.train()
    trainer.save_model(output_dir / "online")
    after = judge(world.model, world.tokenizer, world.held_out, seed + 3, samples=8).share
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry][-1]
    summary = {
        "good_before": offline["good_before"],
        "good_offline": offline["good_after"],
        "good_online": round(after, 4),
        "online_kl": round(kl, 3),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _say(
        f"\n{'held-out completions that deserve thumbs up':46}{'before':>8}{'offline BCO':>13}{'online UNA':>12}\n"
        f"{'':46}{summary['good_before']:8.1%}{summary['good_offline']:13.1%}{summary['good_online']:12.1%}"
    )
    return summary


def _say(text: str) -> None:
    print(text, flush=True)


def plot(history: list[dict], path: Path) -> None:
    """Rewards by class with δ between them, and their margin, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in history if "loss" in line]

    def series(name: str) -> tuple[list, list]:
        points = [(line["step"], line[name]) for line in lines if name in line]
        return [p[0] for p in points], [p[1] for p in points]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(*series("rewards/chosen"), label="thumbs up", color="tab:green")
    left.plot(*series("rewards/rejected"), label="thumbs down", color="tab:red")
    left.plot(*series("delta"), label="δ", color="black", linestyle="--")
    left.set(title="Implicit reward of the training batches", xlabel="optimizer step", ylabel="reward")
    right.plot(*series("rewards/margins"), color="tab:blue")
    right.set(title="Margin: thumbs up minus thumbs down", xlabel="optimizer step", ylabel="reward")
    left.margins(y=0.18)
    left.legend(loc="upper center", ncols=3)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def demo(arguments: list[str]) -> dict:
    """Build a tiny model from a seed, teach it from noisy demonstrations, then align it from thumbs up and down."""
    parser = _Parser(prog="bco-fast demo", allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default="runs/demo", help="where results are written")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the training")
    parser.add_argument("--online", action="store_true", help="then online UNA on the policy's own completions")
    options = parser.parse_args(arguments)
    return (run_online if options.online else run)(Path(options.output_dir), seed=options.seed)
