"""Online alignment: completions sampled from the policy, judged by a reward, trained on with an unpaired objective.

UNA's fourth application (Wang et al., arXiv 2408.15339, section 2.3.4) minimises the difference between the implicit
reward β (logp − logp_ref) and an explicit one on the policy's own completions. Training proceeds in rounds: the current
policy samples a round, the reward judges it, it is kept as a feedback file, and `steps_per_round` steps train on it.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from ..data.batch import collate
from ..data.chat import Message
from ..data.dataset import Example, FeedbackDataset
from ..data.prompts import is_chat, prompts_within, read_prompts
from ..data.samplers import mismatched
from ..models.patch import patch_model
from ..reference.fill import token_logps
from ..reference.identity import reference_id
from ..reference.ranks import gather_objects
from ..training.sharing import choose_layout
from ..training.step import Step
from ..training.trainer import FeedbackTrainer
from .config import OnlineConfig
from .generators import Generator, HuggingFaceGenerator, VllmGenerator
from .rewards import RewardError, score
from .rounds import Sampled, read_round, shuffled, write_round

logger = logging.getLogger("bco_fast")


class _Indices(torch.utils.data.Dataset):
    """Row numbers of the whole run; the policy samples the rows when their step begins."""

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> int:
        return index


def _numbers(indices: list[int]) -> dict[str, Tensor]:
    return {"row": torch.tensor(indices)}


class OnlineFeedbackTrainer(FeedbackTrainer):
    """Align a policy on its own completions, judged by a reward.

    Args:
        model: a Hugging Face causal language model, or the path of one.
        args: an `OnlineConfig`.
        prompts: see `read_prompts`.
        reward: a callable with TRL's reward signature, `reward(prompts=[...], completions=[...], **columns)` -> numbers.
            columns are the other columns of the prompts. Chat prompts are passed as messages, and their completions as
            lists of one message. `rewards.SequenceReward` wraps a classification model.
        processing_class: the tokenizer.
        eval_prompts: held-out prompts; `evaluate` samples them and reports `eval_reward`.
        ref_model: the reference, which stays in memory; by default the base of an adapted model, or a copy of `model`.
        generator: samples completions in place of the one that `args.generator` names.
        **kwargs: of `FeedbackTrainer`.

    Completions and rewards of every round are kept in output_dir/rounds/round-NNNNN.jsonl, a feedback file that offline
    training can read. A run resumed in the middle of a round reads it from there and samples nothing again.

    Raises:
        RewardError: a reward is not finite, their number is wrong, or the reward raised. The prompt is named, the
            completions are kept, and a checkpoint is written to resume from.
        FeedbackError, TypeError, ValueError: as `FeedbackTrainer`; rounds of an earlier run in output_dir.
    """

    def __init__(
        self,
        model: nn.Module | str,
        args: OnlineConfig,
        prompts: str | os.PathLike | Iterable[str | Sequence[Message] | Mapping],
        reward: Callable[..., Sequence[float]],
        processing_class=None,
        eval_prompts: str | os.PathLike | Iterable[str | Sequence[Message] | Mapping] | None = None,
        ref_model: nn.Module | None = None,
        generator: Generator | None = None,
        **kwargs,
    ):
        if not isinstance(args, OnlineConfig):
            raise TypeError(f"args must be an OnlineConfig, not {type(args).__name__}")
        strategy = args.eval_strategy
        if strategy != "no" and eval_prompts is None:
            raise ValueError(f"eval_strategy {strategy.value} needs eval_prompts")
        args.eval_strategy = type(strategy)("no")  # the Trainer would ask for a dataset of tokens
        try:
            super().__init__(model, args, processing_class=processing_class, ref_model=ref_model, **kwargs)
        finally:
            args.eval_strategy = strategy
        if self.sharded:
            raise ValueError(
                "online training samples from the whole model on every rank, which FSDP and DeepSpeed do not keep: use DDP"
            )
        if ref_model is not None:
            self.reference_identity = reference_id(ref_model)
        self.reward, self.tokenizer = reward, self.processing_class
        self.prompts = self._tokenized(read_prompts(prompts))
        self.eval_prompts = None if eval_prompts is None else self._tokenized(read_prompts(eval_prompts))
        ranks = self.accelerator.num_processes
        step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
        self.round_rows, rest = divmod(args.steps_per_round * step_rows, args.replay_epochs)
        if rest or self.round_rows % (args.samples_per_prompt * ranks):
            raise ValueError(
                f"a round trains on {args.steps_per_round * step_rows} rows, which {args.replay_epochs} replay_epochs of "
                f"{args.samples_per_prompt} samples_per_prompt on {ranks} ranks do not divide"
            )
        self.train_dataset = _Indices(args.max_steps * step_rows)
        self.data_collator = _numbers
        self.layout = choose_layout(
            self.accelerator.unwrap_model(self.model), args, self._expected_round(), self.pad_token_id,
            sharded=self.is_deepspeed_enabled or self.is_fsdp_enabled,
        )  # fmt: skip
        self._round: tuple[int, FeedbackDataset] | None = None
        self._resident = self._resident_reference(ref_model)
        self._same_judge = False  # found so by the first round
        self.generator = generator or self._new_generator()

    def _expected_round(self) -> FeedbackDataset:
        """Rows like those to come, to plan by: a few prompts with completions of the greatest length."""
        args, completion = self.args, [self.processing_class.eos_token_id] * self.args.max_new_tokens
        return FeedbackDataset(
            [
                Example(np.array([*prompt, *completion], dtype=np.int64), len(prompt), True, 1.0)
                for _, prompt in self.prompts[:64]
                for _ in range(args.samples_per_prompt)
            ]
        )

    def _new_generator(self) -> Generator:
        args = self.args
        sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
        if args.generator == "hf":
            return HuggingFaceGenerator(self.tokenizer, batch_size=args.generation_batch_size, **sampling)
        path = self.accelerator.unwrap_model(self.model).config.name_or_path
        if not path:
            raise ValueError(
                "generator vllm reads the model's architecture from its folder: pass a model that was loaded"
            )
        memory = args.vllm_gpu_memory_utilization
        return VllmGenerator(
            path, self.tokenizer, max_length=args.max_length, gpu_memory_utilization=memory, **sampling
        )

    def _tokenized(self, rows: list[dict]) -> list[tuple[dict, list[int]]]:
        args = self.args
        room = args.max_length - args.max_new_tokens
        if room < 1:
            raise ValueError(f"max_new_tokens {args.max_new_tokens} leaves no room for a prompt in max_length")
        return prompts_within(rows, self.tokenizer, min(room, args.max_prompt_length or room))

    def _resident_reference(self, ref_model: nn.Module | None) -> nn.Module | None:
        """The model to keep in memory as reference; None where it is the base of the adapted policy."""
        policy = self.accelerator.unwrap_model(self.model)
        if not self.objective.reference or (ref_model is None and hasattr(policy, "disable_adapter")):
            return None
        if ref_model is None:
            ref_model = copy.deepcopy(policy)
        patch_model(ref_model, backend=self.args.backend, workspace_bytes=self.args.workspace_bytes)
        return ref_model.to(self.args.device).eval().requires_grad_(False)

    def _check_start(self) -> None:
        """Nothing is cached that could disagree: the reference runs beside the policy."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def train(self, resume_from_checkpoint=None, **kwargs):
        if not resume_from_checkpoint and self._folder.is_dir() and any(self._folder.glob("round-*.jsonl")):
            raise ValueError(
                f"{self._folder} holds rounds of an earlier run: resume it from a checkpoint, or choose another output_dir"
            )
        return super().train(resume_from_checkpoint, **kwargs)

    # ---- rounds

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir) / "rounds"

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # The loader runs a batch ahead of training, so it carries row numbers only; the rows are sampled here.
        indices, _ = Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
        if not indices:
            return indices, None
        batches = [self._prepare_inputs(self._batch(batch["row"].tolist())) for batch in indices]
        return batches, Step.of(batches)

    def _batch(self, indices: list[int]) -> dict[str, Tensor]:
        args, items = self.args, []
        for index in indices:
            number, place = divmod(index, self.round_rows * args.replay_epochs)
            epoch, place = divmod(place, self.round_rows)
            # Rows of one prompt stay together where batches share it.
            together = args.samples_per_prompt if self.layout == "shared" else 1
            order = shuffled(f"{args.seed}/{number}/{epoch}", self.round_rows // together)
            items.append(self._round_dataset(number)[order[place // together] * together + place % together])
        return collate(items, self.pad_token_id, layout=self.layout)

    def _round_dataset(self, number: int) -> FeedbackDataset:
        if self._round is not None and self._round[0] == number:
            return self._round[1]
        judged = self._folder / f"round-{number:05d}.jsonl"
        if judged.is_file():
            whole = read_round(judged)
        else:
            whole = self._judged(number)
            if self.accelerator.is_main_process:
                write_round(judged, whole, self.args.reward_threshold)
                self._unjudged(number).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
        dataset = self._with_reference(whole)
        self._log_round(number, whole, dataset)
        self._round = (number, dataset)
        return dataset

    def _unjudged(self, number: int) -> Path:
        return self._folder / f"sampled-{number:05d}.jsonl"

    def _judged(self, number: int) -> list[Sampled]:
        """The round's completions with their rewards; completions that were sampled before are not sampled again."""
        kept = self._unjudged(number)
        sampled = read_round(kept) if kept.is_file() else self._sample(self._round_prompts(number), number)
        if not kept.is_file() and self.accelerator.is_main_process:
            write_round(kept, sampled, self.args.reward_threshold)
        self.accelerator.wait_for_everyone()
        try:
            return self._rewarded(sampled)
        except RewardError as error:
            if self.fingerprint is not None:
                self.fingerprint["model"]["reward"] = None  # it may be mended under another name
            self._save_checkpoint(self.model, trial=None)
            folder = f"checkpoint-{self.state.global_step}"
            raise RewardError(
                f"round {number}: {error} The completions are kept in {kept}; mend the reward and resume from {folder}."
            ) from error

    def _round_prompts(self, number: int) -> list[tuple[dict, list[int]]]:
        """The next prompts of an endless run of shuffled passes, each `samples_per_prompt` times."""
        count = self.round_rows // self.args.samples_per_prompt
        chosen = []
        for place in range(number * count, (number + 1) * count):
            turn, at = divmod(place, len(self.prompts))
            chosen.append(self.prompts[shuffled(f"{self.args.seed}/prompts/{turn}", len(self.prompts))[at]])
        return [prompt for prompt in chosen for _ in range(self.args.samples_per_prompt)]

    def _sample(self, prompts: list[tuple[dict, list[int]]], number: int) -> list[Sampled]:
        """Every rank samples its share; all of them get all."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = prompts[rank::ranks]
        seed = int(np.random.SeedSequence([self.args.seed, number, rank]).generate_state(1)[0])
        policy = self.accelerator.unwrap_model(self.model)
        completions = self.generator(policy, [ids for _, ids in mine], seed)
        made = [
            Sampled(
                row["prompt"],
                {name: value for name, value in row.items() if name != "prompt"},
                list(ids),
                tokens,
                self.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            )
            for (row, ids), tokens in zip(mine, completions, strict=True)
        ]
        whole: list = [None] * len(prompts)
        for other, share in enumerate(gather_objects(made)):
            whole[other::ranks] = share
        return whole

    def _rewarded(self, sampled: list[Sampled]) -> list[Sampled]:
        """Every rank judges its share, whose completions of one prompt stay together; all of them get all rewards."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        begin, end = (len(sampled) * part // ranks for part in (rank, rank + 1))
        values, probe, problem = [], None, None
        try:
            if ranks > 1 and not self._same_judge:
                probe = self._judge(sampled[:1])[0]
            values = self._judge(sampled[begin:end])
        except RewardError as error:
            problem = error
        said = gather_objects((values, probe, None if problem is None else str(problem)))
        for other, (_, first, text) in enumerate(said):
            if text is not None:
                raise RewardError(text if ranks == 1 else f"rank {other}: {text}") from problem
            if not math.isclose(first or 0.0, said[0][1] or 0.0, rel_tol=1e-3, abs_tol=1e-6):
                raise RewardError(
                    f"the judge of rank {other} gives {first} where that of rank 0 gives {said[0][1]}, for the same "
                    "completion: all ranks need the same judge, without randomness."
                )
        self._same_judge = True
        rewards = [value for values, *_ in said for value in values]
        return [replace(row, reward=float(value)) for row, value in zip(sampled, rewards, strict=True)]

    def _judge(self, sampled: list[Sampled]) -> list[float]:
        names = sorted({name for row in sampled for name in row.columns})
        columns = {name: [row.columns.get(name) for row in sampled] for name in names}
        completions = [
            [{"role": "assistant", "content": row.completion}] if is_chat(row.prompt) else row.completion
            for row in sampled
        ]
        return score(self.reward, [row.prompt for row in sampled], completions, **columns)

    def _scores(self, rewards: list[float]) -> list[float]:
        """What the objective fits: rewards as they are, or in [0, 1] for una_score."""
        values = np.array(rewards, dtype=np.float64)
        if self.args.reward_scale == "sigmoid":
            values = 1 / (1 + np.exp(-values))
        elif self.args.reward_scale == "minmax":
            spread = values.max() - values.min()
            values = (values - values.min()) / spread if spread > 0 else np.full_like(values, 0.5)
        elif self.objective.data == "scores" and ((values < 0) | (values > 1)).any():
            row = int(np.flatnonzero((values < 0) | (values > 1))[0])
            raise RewardError(
                f"reward {row} is {values[row]}: una_score needs [0, 1], or reward_scale sigmoid or minmax."
            )
        return values.tolist()

    def _with_reference(self, rows: list[Sampled]) -> FeedbackDataset:
        scores = self._scores([row.reward for row in rows])
        examples = [
            Example(
                np.array([*row.prompt_ids, *row.completion_ids], dtype=np.int64),
                len(row.prompt_ids),
                row.reward > self.args.reward_threshold,
                1.0,
                value,
            )
            for row, value in zip(rows, scores, strict=True)
        ]
        dataset = FeedbackDataset(examples)
        if self.objective.mismatched:
            dataset.mismatched = mismatched(dataset, max_length=self.args.max_length)
        if self.objective.reference:
            for part in (dataset, dataset.mismatched):
                if part is not None:
                    part.ref_token_logps = self._reference_token_logps(part.examples)
                    part.ref_logps = np.array([values.sum(dtype=np.float64) for values in part.ref_token_logps])
        return dataset

    @torch.no_grad()
    def _reference_token_logps(self, examples: list[Example]) -> list[np.ndarray]:
        """Forward only: the resident reference, or the policy with its adapter disabled."""
        if self._resident is not None:
            return self._token_logps(self._resident, examples)
        policy = self.accelerator.unwrap_model(self.model)
        with policy.disable_adapter():
            return self._token_logps(policy, examples)

    @torch.no_grad()
    def _token_logps(self, model: nn.Module, examples: list[Example]) -> list[np.ndarray]:
        """Every rank computes its share; all of them get all."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        training, values, own = model.training, [], examples[rank::ranks]
        model.eval()
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(own), size):
            part = own[start : start + size]
            with self.compute_loss_context_manager():
                values += token_logps(model, part, self.pad_token_id, self.layout)
        model.train(training)
        whole: list = [None] * len(examples)
        for other, share in enumerate(gather_objects(values)):
            whole[other::ranks] = share
        return whole

    def _log_round(self, number: int, rows: list[Sampled], dataset: FeedbackDataset) -> None:
        if any(line.get("round") == number for line in self.state.log_history):
            return  # resumed in the middle of it; the policy has moved since, and its KL with it
        rewards = np.array([row.reward for row in rows])
        logs = {
            "round": number,
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "completions/mean_length": float(np.mean([len(row.completion_ids) for row in rows])),
        }
        if dataset.ref_logps is not None:
            # the policy's own samples, so the mean log-ratio estimates its KL from the reference
            own = self._token_logps(self.accelerator.unwrap_model(self.model), dataset.examples)
            logs["kl"] = float(np.mean([v.sum(dtype=np.float64) for v in own] - dataset.ref_logps))
        self.log(logs)

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample the held-out prompts once, with a fixed seed; -> mean and standard error of the reward."""
        if self.eval_prompts is None:
            raise ValueError("no eval_prompts were given")
        sampled = self._rewarded(self._sample(self.eval_prompts, 2**31))
        rewards = np.array([row.reward for row in sampled])
        metrics = {
            f"{metric_key_prefix}_reward": float(rewards.mean()),
            f"{metric_key_prefix}_reward_stderr": float(rewards.std() / math.sqrt(len(rewards))),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
