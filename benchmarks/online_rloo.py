"""Online UNA against an RLHF baseline: our `OnlineFeedbackTrainer` and TRL's RLOOTrainer from one start.

    make venv-peers && python benchmarks/online_rloo.py --seed 0          results/online_rloo.json
    python benchmarks/online_rloo.py --tune 'bco_fast una_score'          results/online_rloo_tuning.json

Both start from the demo's fine-tuned model, see its prompts, sample them at temperature 1, four completions of a prompt,
64 completions a step, are judged by its rule (1 for a right completion, 0 for another), and stop when they have generated
the same number of tokens. Every case is a process of its own environment; the processes take turns of a fifth of the
budget. Between turns this program samples the policies on held-out prompts: their reward, and the KL from the start,
E[log pi - log pi_ref] over a policy's own samples, in nats per completion.

Both are run with samples that are new for every step (TRL's default), and with eight steps on the samples of one round
(ours), where TRL's ratio of old and new probabilities corrects for their age. UNA is run on scores (una_score) and on
thumbs (una_binary_bce). Learning rate and beta of each case are those of the highest reward in `GRID` on the held-out
prompts of seed 10, which is no seed of the result. RLOO is run with TRL's default beta too: it was added when the
best setting fell back on seed 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from common import RESULTS, Worker, peak_rss, peers_python, reset_peak_rss, save, say, table

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the peer's environment has no bco_fast; the rule that judges is the same code for both

PEER = "trl-1.16"
STEP_COMPLETIONS, PER_PROMPT, MAX_NEW_TOKENS, SAMPLES, TUNING_SEED = 64, 4, 8, 8, 10
GRID = {"learning_rate": (1e-4, 3e-4, 1e-3), "beta": {"bco_fast": (0.25, 0.5), "TRL": (0.01, 0.05)}}


@dataclasses.dataclass(frozen=True)
class Case:
    steps_per_round: int
    """Optimizer steps between samplings."""
    learning_rate: float
    beta: float
    loss_type: str | None = None
    """Ours only."""


OURS = "bco_fast una_score"
CASES = {
    OURS: Case(8, 3e-4, 0.5, "una_score"),
    "bco_fast una_score, new samples each step": Case(1, 1e-3, 0.25, "una_score"),
    "bco_fast una_binary_bce": Case(8, 1e-3, 0.25, "una_binary_bce"),
    "TRL 1.16 RLOO": Case(1, 1e-3, 0.01),
    "TRL 1.16 RLOO, its default beta": Case(1, 1e-3, 0.05),
    "TRL 1.16 RLOO, 8 steps a round": Case(8, 3e-4, 0.05),
}


# ---- in the process of a case


def options_of(case: Case, folder: Path, seed: int) -> dict:
    """Arguments that both trainers take."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": STEP_COMPLETIONS,
        "learning_rate": case.learning_rate,
        "beta": case.beta,
        "lr_scheduler_type": "constant_with_warmup",  # where a run stops hangs on its tokens, not on its steps
        "warmup_steps": 10,
        "max_steps": 1_000_000 // case.steps_per_round * case.steps_per_round,
        "temperature": 1.0,
        "top_p": 1.0,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }


def ours(case: Case, folder: Path, seed: int, count, reward=None, **options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bco_fast.cli.demo import rule_reward
    from bco_fast.online.config import OnlineConfig
    from bco_fast.online.trainer import OnlineFeedbackTrainer

    args = OnlineConfig(
        **options_of(case, folder, seed),
        loss_type=case.loss_type,
        max_length=64,
        max_new_tokens=MAX_NEW_TOKENS,
        samples_per_prompt=PER_PROMPT,
        steps_per_round=case.steps_per_round,
        generation_batch_size=256,
        per_device_eval_batch_size=STEP_COMPLETIONS,  # of the reference too: as large as in TRL
        **options,
    )
    trainer = OnlineFeedbackTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "start"),
        args,
        json.loads((folder / "prompts.json").read_text())["train"],
        reward or rule_reward,
        processing_class=AutoTokenizer.from_pretrained(folder / "start"),
    )
    generate = trainer.generator
    trainer.generator = lambda *arguments: count(generate(*arguments))
    return trainer


def rloo(case: Case, folder: Path, seed: int, count, reward=None):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    from bco_fast.cli.demo import rule_reward

    class Counting(RLOOTrainer):
        def _generate_single_turn(self, *arguments):
            return count(super()._generate_single_turn(*arguments))

    prompts = json.loads((folder / "prompts.json").read_text())["train"]
    args = RLOOConfig(
        **options_of(case, folder, seed),
        num_generations=PER_PROMPT,
        max_completion_length=MAX_NEW_TOKENS,
        steps_per_generation=case.steps_per_round,
        gradient_checkpointing=False,
        bf16=False,
    )
    return Counting(
        AutoModelForCausalLM.from_pretrained(folder / "start"),
        reward or rule_reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(folder / "start"),
    )


def work(build: Callable, case: Case, folder: Path, options: argparse.Namespace) -> None:
    """Train; save the policy and wait when a turn is over. Talks to the parent by lines of JSON that begin with @."""
    from transformers import TrainerCallback

    generated = 0

    def count(completions: list[list[int]]) -> list[list[int]]:
        nonlocal generated
        generated += sum(map(len, completions))
        return completions

    class Turns(TrainerCallback):
        """A turn ends at the first boundary of rounds behind its share of the budget."""

        def on_train_begin(self, *_, **__):
            self.turn, self.before = 1, reset_peak_rss()
            self.wait()

        def wait(self):
            if not sys.stdin.readline():
                sys.exit("the parent is gone")
            self.start = time.perf_counter(), time.process_time(), generated

        def on_step_end(self, args, state, control, model, **_):
            due = generated >= options.budget * self.turn / options.turns
            if not due or state.global_step % case.steps_per_round:
                return
            ends = time.perf_counter(), time.process_time(), generated
            seconds, processor, tokens = (b - a for a, b in zip(self.start, ends, strict=True))
            answer = {"seconds": seconds, "processor": processor, "tokens": tokens, "step": state.global_step}
            answer |= {"peak_mb": round(peak_rss() / 1e6, 1), "before_mb": round(self.before / 1e6, 1)}
            answer |= getattr(trainer, "sizes", {})
            getattr(model, "policy", model).save_pretrained(folder / "policy")  # PPO trains its value model beside it
            answer["versions"] = {package: version(package) for package in ("transformers", "torch")}
            if not case.loss_type:
                answer["versions"]["trl"] = version("trl")
            say(answer)
            if self.turn == options.turns:
                sys.exit()  # TRL's PPO does not read control.should_training_stop
            self.turn += 1
            self.wait()

    trainer = build(case, folder, options.seed, count)
    trainer.add_callback(Turns())
    say({})
    trainer.train()


# ---- in the parent


class Contestant(Worker):
    """A case in its own process, with the start and the prompts that all share."""

    script, peer, shared = __file__, PEER, ("start", "prompts.json")

    def __init__(self, name: str, case: Case, world: Path, folder: Path, options: argparse.Namespace):
        self.case, self.folder, self.turns = case, folder, []
        folder.mkdir()
        for shared in self.shared:
            (folder / shared).symlink_to(world / shared)
        arguments = ["--worker", "--settings", json.dumps(dataclasses.asdict(case)), "--folder", folder]
        arguments += ["--seed", options.seed, "--budget", options.budget, "--turns", options.turns]
        super().__init__(name, [self.python(), self.script, *arguments], folder / "log", HF_HUB_OFFLINE="1")

    def python(self) -> str | Path:
        return sys.executable if self.case.loss_type else peers_python(self.peer)


def evaluate(folder: Path, seed: int, **rewards: Callable) -> dict:
    """Reward of a policy on held-out prompts by the rule and by other rewards, and its KL from the start, nats per
    completion."""
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bco_fast.cli.demo import rule_reward
    from bco_fast.data.dataset import Example
    from bco_fast.models.patch import patch_model
    from bco_fast.online.generators import HuggingFaceGenerator
    from bco_fast.reference.fill import token_logps

    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    prompts = json.loads((folder / "prompts.json").read_text())["held_out"] * SAMPLES
    ids = tokenizer(prompts)["input_ids"]
    policy, start = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("policy", "start"))
    generate = HuggingFaceGenerator(
        tokenizer, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, top_p=1.0, batch_size=256
    )
    completions = generate(policy, ids, seed)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    found = {name: reward(prompts, texts) for name, reward in {"reward": rule_reward, **rewards}.items()}
    examples = [
        Example(np.array(prompt + completion), len(prompt), True, 1.0)
        for prompt, completion in zip(ids, completions, strict=True)
    ]
    sums = []
    for model in (policy, start):
        patch_model(model)
        sums.append([values.sum(dtype=np.float64) for values in _inference(token_logps, model, examples, tokenizer)])
    return {name: float(np.mean(values)) for name, values in found.items()} | {"kl": float(np.mean(np.subtract(*sums)))}


def _inference(token_logps, model, examples, tokenizer) -> list:
    import torch

    with torch.no_grad():
        return token_logps(model, examples, tokenizer.pad_token_id)


def prepare(folder: Path, seed: int, fine_tune_steps: int) -> dict:
    """The start and the prompts, in files; -> the start's own reward and KL, which is 0."""
    from bco_fast.cli.demo import build_world

    folder.mkdir()
    world = build_world(seed, fine_tune_steps=fine_tune_steps)
    world.model.save_pretrained(folder / "start")
    world.tokenizer.save_pretrained(folder / "start")
    (folder / "prompts.json").write_text(json.dumps({"train": world.prompts, "held_out": world.held_out}))
    (folder / "policy").symlink_to(folder / "start")
    return evaluate(folder, seed)


def measure(
    cases: dict[str, tuple[str, Case]],
    options: argparse.Namespace,
    folder: Path,
    prepare: Callable = prepare,
    contestant: type[Contestant] = Contestant,
    evaluate: Callable = evaluate,
) -> list[dict]:
    """Rows of one seed. cases: label -> (name in CASES, settings)."""
    world = folder / "world"
    start = prepare(world, options.seed, options.fine_tune_steps)
    workers: dict[str, Contestant] = {}
    try:
        for number, (label, (name, case)) in enumerate(cases.items()):
            workers[label] = contestant(name, case, world, folder / str(number), options)
            workers[label].answer()  # ready: before the next one starts, so that they do not disturb each other
        for _ in range(options.turns):
            for worker in workers.values():
                turn = worker.turn()
                worker.turns.append(turn | evaluate(worker.folder, options.seed))
    finally:
        for worker in workers.values():
            worker.stop()
    return [_row(label, worker, start, options.seed) for label, worker in workers.items()]


def _row(label: str, worker: Contestant, start: dict, seed: int) -> dict:
    turns, last = worker.turns, worker.turns[-1]
    tokens, steps = [turn["tokens"] for turn in turns], [turn["step"] for turn in turns]
    per_step = [
        turn["seconds"] / (step - earlier) for turn, step, earlier in zip(turns, steps, [0, *steps], strict=False)
    ]
    return {
        "benchmark": "online_rloo", "case": f"{label}, seed {seed}", "method": label, "seed": seed,
        **dataclasses.asdict(worker.case), "completions_per_step": STEP_COMPLETIONS, "max_new_tokens": MAX_NEW_TOKENS,
        "reward_before": round(start["reward"], 4), "reward": round(last["reward"], 4), "kl": round(last["kl"], 3),
        "rewards": [round(turn["reward"], 4) for turn in turns], "kls": [round(turn["kl"], 3) for turn in turns],
        "generated_tokens": sum(tokens), "steps": steps[-1],
        "step_median_s": round(statistics.median(per_step), 4), "step_min_s": round(min(per_step), 4),
        "step_max_s": round(max(per_step), 4), "seconds": round(sum(turn["seconds"] for turn in turns), 2),
        "processor_seconds": round(sum(turn["processor"] for turn in turns), 2),
        "peak_mb": last["peak_mb"], "before_mb": last["before_mb"], "versions": last["versions"],
        **{name: last[name] for name in ("model_reward", "models_mb", "trained_mb") if name in last},
    }  # fmt: skip


def grid(name: str, case: Case) -> dict[str, tuple[str, Case]]:
    """What `tune` measures."""
    settings = itertools.product(GRID["learning_rate"], GRID["beta"][name.split()[0]])
    return {
        f"{name}, lr {rate:g}, beta {beta:g}": (name, dataclasses.replace(case, learning_rate=rate, beta=beta))
        for rate, beta in settings
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the start, the prompts and the training")
    parser.add_argument("--budget", type=int, default=100_000, help="tokens each case generates")
    parser.add_argument("--turns", type=int, default=5, help="parts of the budget; each ends with an evaluation")
    parser.add_argument("--fine-tune-steps", type=int, default=250, help="of the start, on demonstrations")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to run")
    parser.add_argument("--tune", choices=CASES, help=f"run the grid of one case on seed {TUNING_SEED} instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--settings", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        case = Case(**json.loads(options.settings))
        work(ours if case.loss_type else rloo, case, Path(options.folder), options)
        return
    if options.tune:
        options.seed, options.cases = TUNING_SEED, [options.tune]
    peers = [case for case in options.cases if not CASES[case].loss_type]
    if peers:
        try:
            peers_python(PEER)
        except FileNotFoundError as error:
            parser.error(str(error))
    name = "online_rloo_tuning" if options.tune else "online_rloo"
    cases = grid(options.tune, CASES[options.tune]) if options.tune else {c: (c, CASES[c]) for c in options.cases}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(cases, options, Path(folder))
    print(save(name, rows, folder=options.out, keys=("case",)))
    print(table(rows, ["case", "reward_before", "reward", "kl", "generated_tokens", "steps", "step_median_s", "seconds", "peak_mb", "before_mb"]))  # fmt: skip


if __name__ == "__main__":
    main()
