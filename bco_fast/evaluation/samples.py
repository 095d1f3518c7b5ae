"""Completions of a few prompts before, during and after training: how the model changes, to be read.

samples.jsonl, in output_dir    {"step", "prompt", "completion", "tokens", "ended"}, in the order of the steps
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from ..data.chat import Message
from ..data.form import follow
from ..data.prompts import Prompt, is_chat, read_prompts
from ..data.sources import one_line
from ..data.tokenizer import positions
from ..files import atomic_text
from ..training.record import SAMPLES
from .generate import GenerationError, Sampling, complete, encode_prompts

if TYPE_CHECKING:
    from ..training.trainer import FeedbackTrainer

logger = logging.getLogger("bco_fast")

MOST = 64
"""Prompts: each is answered several times, and somebody is to read that."""
TOKENS = 128
"""Longest completion by default."""
_SHOWN = 200
"""Characters of a completion in the log."""


class PromptSamples(TrainerCallback):
    """Answers prompts greedily before training, every so many optimizer steps, and after training.

    The completions are logged, written to samples.jsonl and, where the run reports to TensorBoard, shown there as text.
    Prompts are read in the form that the training rows have, so a chat template is used if it was used for them. Sampling
    draws no random numbers: a run with samples trains like one without. A resumed run continues the file of the run that
    was interrupted.

        PromptSamples("prompts.jsonl", every=100).attach(trainer)

    Args:
        prompts: what `read_prompts` takes, at most 64 different ones.
        every: optimizer steps between samples; None for a quarter of the run.
        max_new_tokens: longest completion; None for 128, or half of the model's positions if that is less.

    Raises:
        FeedbackError: the prompts cannot be read.
        GenerationError: there are too many of them, or a number is out of its range.
    """

    def __init__(
        self,
        prompts: str | os.PathLike | Iterable[str | Sequence[Message] | Mapping],
        *,
        every: int | None = None,
        max_new_tokens: int | None = None,
    ):
        for name, value in (("sample_every", every), ("sample_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise GenerationError(f"{name} must be at least 1, not {value}")
        # each once: in a file of feedback every completion repeats its prompt
        self.prompts = list({json.dumps(prompt["prompt"]): prompt for prompt in read_prompts(prompts)}.values())
        if len(self.prompts) > MOST:
            raise GenerationError(f"sample_prompts has {len(self.prompts):,} different prompts; {MOST} are the most")
        self.every, self.max_new_tokens = every, max_new_tokens
        self.rows: list[dict] = []
        self._encoded: list[list[int]] | None = None
        self._shown = 0
        """Of the rows, those that TensorBoard has."""

    def encode(self, tokenizer, form: Mapping[str, str | None]) -> None:
        """Tokenize the prompts.

        Args:
            form: of the training rows (`FeedbackDataset.form`).

        Raises:
            FeedbackError, GenerationError: a prompt fits neither the tokenizer nor its template.
        """
        trained = form if form.get("form") in ("text", "chat") else None
        chat = follow(trained, self.prompts, tokenizer)
        self._encoded = encode_prompts(tokenizer, self.prompts, chat=chat)

    def attach(self, trainer: FeedbackTrainer) -> None:
        """Let the trainer call this at every step.

        Raises:
            ValueError: the model is sharded; what `encode` raises; a number does not fit the model's positions.
        """
        if trainer.sharded:
            raise ValueError(
                "sample_prompts needs the whole model on each process, and FSDP and ZeRO-3 shard it: leave it out, and run "
                "`bco-fast generate` on the checkpoints"
            )
        self.trainer, tokenizer = trainer, trainer.processing_class
        if self._encoded is None:
            self.encode(tokenizer, {} if trainer.train_dataset is None else trainer.train_dataset.form)
        most = positions(trainer.accelerator.unwrap_model(trainer.model))
        tokens = self.max_new_tokens or min(TOKENS, most // 2 if most else TOKENS)
        if most and tokens >= most:
            raise GenerationError(f"sample_tokens is {tokens}, but the model has {most} positions")
        if most:
            self._encoded = [ids[tokens - most :] for ids in self._encoded]
        self.sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
        # first, so that TensorBoard is still open at the end
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args, state, control, **kwargs):
        self._steps = self.every or max(1, -(-state.max_steps // 4))
        self.rows = self._earlier(Path(args.output_dir), state.global_step) if state.global_step else []
        self._shown = len(self.rows)

    def on_step_begin(self, args, state, control, **kwargs):
        if not state.global_step:  # not earlier: now TensorBoard is open, and the folder has been cleared
            self._sample(state)
        self._show()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._steps == 0 and state.global_step < state.max_steps:
            self._sample(state)

    def on_train_end(self, args, state, control, **kwargs):
        if not self.rows or self.rows[-1]["step"] < state.global_step:
            self._sample(state)
        self._show()

    def _earlier(self, folder: Path, step: int) -> list[dict]:
        """The rows of an interrupted run up to the step that it resumes from."""
        asked, rows = {json.dumps(row["prompt"]) for row in self.prompts}, []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for line in (folder / SAMPLES).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row["step"] <= step and json.dumps(row["prompt"]) in asked:
                    rows.append(row)
        return rows

    def _sample(self, state) -> None:
        if not state.is_world_process_zero:
            return
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with trainer.compute_loss_context_manager():
            completions = complete(model, trainer.processing_class, self._encoded, self.sampling)
        for prompt, completion in zip(self.prompts, completions, strict=True):
            said = {"completion": completion.text, "tokens": completion.tokens, "ended": completion.ended}
            self.rows.append({"step": state.global_step, "prompt": prompt["prompt"], **said})
            text = _cut(one_line(completion.text), _SHOWN)
            logger.info("sample at step %d: %s -> %s", state.global_step, last_words(prompt["prompt"]), text)
        with atomic_text(Path(trainer.args.output_dir) / SAMPLES) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)

    def _show(self) -> None:
        boards = (getattr(callback, "tb_writer", None) for callback in self.trainer.callback_handler.callbacks)
        board = next((writer for writer in boards if writer is not None), None)
        if board is None:
            return
        for row in self.rows[self._shown :]:
            number = next(i for i, prompt in enumerate(self.prompts) if prompt["prompt"] == row["prompt"])
            text = f"**{last_words(row['prompt'])}**\n\n{row['completion']}"
            board.add_text(f"samples/{number}", text, row["step"])
        self._shown = len(self.rows)


def last_words(prompt: Prompt, most: int = 80) -> str:
    """A prompt, or the last message of one, on a line."""
    return _cut(one_line(str(prompt[-1]["content"]) if is_chat(prompt) else prompt), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
