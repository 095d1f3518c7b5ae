"""Online UNA against RLHF with a reward model: our `OnlineFeedbackTrainer`, and TRL 1.12's RLOOTrainer and PPOTrainer.

    make venv-peers && python benchmarks/online_ppo.py --seed 0          results/online_ppo.json
    python benchmarks/online_ppo.py --tune                                results/online_ppo_tuning.json

The comparison of online_rloo.py (start, prompts, temperature, completions a step, tokens, turns) with another judge: a
Bradley-Terry model that TRL's RewardTrainer trains, from the start's weights, on pairs of the start's own completions of which the
rule likes one. The three methods see this model only, and it sees the same tokens; una_score takes its sigmoid. `model_reward` is
the model's mean logit on held-out prompts, `reward` the rule's share of good completions, by which no setting was chosen. The
learning rate of PPO is that of the highest model_reward among `RATES` on seed 10, after half the tokens; those of the others were found in the same way by
online_rloo.py. beta is TRL's default, and ours the demo's. Processor time is that of one thread (OMP_NUM_THREADS=1).

All three run in the environment of TRL 1.12, with the same torch and transformers: what a library imports because another
package is installed would else be counted as a method's memory. `before_mb` is what a process holds when training begins.

PPO is TRL's: one completion of a prompt, four passes over each batch, a value model that starts as the reward model. So it holds
four models of one size and trains two; RLOO and UNA hold three and train one. `models_mb` counts their weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import tempfile
from pathlib import Path

import online_rloo as base
from common import RESULTS, peers_python, save, table
from online_rloo import MAX_NEW_TOKENS, STEP_COMPLETIONS, TUNING_SEED, Case, Contestant

PEER = "trl-1.12"
REWARD_STEPS, REWARD_SAMPLES = 200, 6
PPO, RLOO, OURS = "TRL 1.12 PPO", "TRL 1.12 RLOO", "bco_fast una_score"
CASES = {OURS: Case(8, 3e-4, 0.5, "una_score"), RLOO: Case(8, 3e-4, 0.05), PPO: Case(1, 3e-4, 0.05)}


RATES = (1e-4, 3e-4, 1e-3)


# ---- in the process of a case


def judge(folder: Path):
    from bco_fast.online.rewards import SequenceReward

    return SequenceReward(folder / "reward_model", batch_size=256)


def sizes(models: list, trained: list) -> dict:
    """Weights of models, MB."""
    total, moved = (
        sum(p.numel() * p.element_size() for m in some for p in m.parameters()) for some in (models, trained)
    )
    return {"models_mb": round(total / 1e6, 2), "trained_mb": round(moved / 1e6, 2)}


def ours(case: Case, folder: Path, seed: int, count):
    reward = judge(folder)
    trainer = base.ours(case, folder, seed, count, reward, reward_scale="sigmoid")
    trainer.sizes = sizes([trainer.model, trainer._resident, reward.model], [trainer.model])
    return trainer


def rloo(case: Case, folder: Path, seed: int, count):
    reward = judge(folder)
    trainer = base.rloo(case, folder, seed, count, reward)
    trainer.sizes = sizes([trainer.model, trainer.ref_model, reward.model], [trainer.model])
    return trainer


def ppo(case: Case, folder: Path, seed: int, count):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    options = base.options_of(case, folder, seed)
    for theirs in ("beta", "top_p", "max_steps"):  # kl_coef, always 1, total_episodes
        options.pop(theirs)
    args = PPOConfig(
        **options,
        kl_coef=case.beta,
        total_episodes=1_000_000 * STEP_COMPLETIONS,
        response_length=MAX_NEW_TOKENS,
        stop_token="eos",  # noqa: S106 - a name, not a secret
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
    )
    sample = ppo_trainer.batch_generation

    def counted(model, queries, *arguments):
        made, logits = sample(model, queries, *arguments)
        count([row[row != tokenizer.pad_token_id].tolist() for row in made[:, queries.shape[1] :]])
        return made, logits

    ppo_trainer.batch_generation = counted
    prompts = json.loads((folder / "prompts.json").read_text())["train"]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "start") for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", num_labels=1) for _ in range(2)
    )
    trainer = PPOTrainer(
        args,
        tokenizer,
        policy,
        reference,
        reward,
        Dataset.from_list([{"input_ids": ids} for ids in tokenizer(prompts)["input_ids"]]),
        value,
    )
    trainer.sizes = sizes([policy, value, reference, reward], [policy, value])
    return trainer


def train_reward(folder: Path, seed: int) -> None:
    """TRL's RewardTrainer on folder/pairs.json; -> folder/reward_model. Runs in the peer's environment."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "start", num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    args = RewardConfig(
        output_dir=str(folder / "reward_out"),
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        max_steps=REWARD_STEPS,
        center_rewards_coefficient=0.01,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    data = Dataset.from_list(json.loads((folder / "pairs.json").read_text()))
    trainer = RewardTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder / "reward_model")


# ---- in the parent


class Rival(Contestant):
    script, peer, shared = __file__, PEER, ("start", "prompts.json", "reward_model")

    def python(self):
        return peers_python(self.peer)


def evaluate(folder: Path, seed: int) -> dict:
    return base.evaluate(folder, seed, model_reward=judge(folder))


def prepare(folder: Path, seed: int, fine_tune_steps: int) -> dict:
    """The start, the prompts and the reward model, in files; -> what `evaluate` says of the start."""
    import subprocess

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bco_fast.cli.demo import rule_reward, sample

    base.prepare(folder, seed, fine_tune_steps)
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    prompts = json.loads((folder / "prompts.json").read_text())["train"]
    completions = sample(
        AutoModelForCausalLM.from_pretrained(folder / "start"), tokenizer, prompts * REWARD_SAMPLES, seed
    )
    sides: dict[str, dict[float, str]] = {}
    for prompt, completion, good in zip(prompts * REWARD_SAMPLES, completions, rule_reward(prompts * REWARD_SAMPLES, completions), strict=True):  # fmt: skip
        sides.setdefault(prompt, {})[good] = completion

    def ids(prompt: str, completion: str) -> list[int]:
        return [*tokenizer(prompt)["input_ids"], *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]

    pairs = [{"chosen_ids": ids(p, both[1.0]), "rejected_ids": ids(p, both[0.0])} for p, both in sides.items() if len(both) == 2]  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps(pairs))
    command = [peers_python(PEER), __file__, "--reward-model", "--folder", folder, "--seed", seed]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"TRL's RewardTrainer failed:\n{done.stderr[-3000:]}")
    return evaluate(folder, seed)


def grid() -> dict[str, tuple[str, Case]]:
    return {f"{PPO}, lr {rate:g}": (PPO, dataclasses.replace(CASES[PPO], learning_rate=rate)) for rate in RATES}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the start, the prompts and the training")
    parser.add_argument("--budget", type=int, default=20_000, help="tokens each case generates")
    parser.add_argument("--turns", type=int, default=2, help="parts of the budget; each ends with an evaluation")
    parser.add_argument("--fine-tune-steps", type=int, default=250, help="of the start, on demonstrations")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to run")
    parser.add_argument(
        "--tune", action="store_true", help=f"run PPO at each rate, for half the tokens, on seed {TUNING_SEED}"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    for hidden in ("--worker", "--reward-model"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--settings", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.reward_model:
        train_reward(Path(options.folder), options.seed)
        return
    if options.worker:
        case = Case(**json.loads(options.settings))
        build = ours if case.loss_type else ppo if case.steps_per_round == 1 else rloo
        base.work(build, case, Path(options.folder), options)
        return
    try:
        peers_python(PEER)
    except FileNotFoundError as error:
        parser.error(str(error))
    name, cases = "online_ppo", {case: (case, CASES[case]) for case in options.cases}
    if options.tune:
        name, options.seed, cases = "online_ppo_tuning", TUNING_SEED, grid()
        options.budget, options.turns = options.budget // 2, 1
    with tempfile.TemporaryDirectory() as folder:
        rows = base.measure(cases, options, Path(folder), prepare, Rival, evaluate)
    spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for row in rows:
        row["benchmark"] = name
        row["whole_processor_s"] = round(spent)  # of the program with all its processes
        row["ms_per_token"] = round(1000 * row["processor_seconds"] / row["generated_tokens"], 3)
    print(save(name, rows, folder=options.out, keys=("case",)))
    print(table(rows, ["case", "reward_before", "reward", "model_reward", "kl", "generated_tokens", "steps", "seconds", "peak_mb", "before_mb", "models_mb"]))  # fmt: skip


if __name__ == "__main__":
    main()
