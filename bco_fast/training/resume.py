"""Bit-exact resume, from whole checkpoints only: what the Trainer lacks for it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from ..files import json_numbers
from .checkpoints import CheckpointError, Verdict, begin, candidates, choose, commit, examine, rotate
from .fingerprint import differences, fingerprint, read_fingerprint, write_fingerprint
from .finite import FiniteWatch

logger = logging.getLogger("bco_fast")


class _SaveAfterEpochEnd(TrainerCallback):
    """Delays a save at the last step of an epoch, or of the run, until that epoch's log line and evaluation are done.

    Otherwise a run resumed from it would lack them, and the random numbers that the evaluation draws.
    """

    waiting = False

    def on_step_end(self, args, state, control, **kwargs):
        more_to_come = IntervalStrategy.EPOCH in (args.logging_strategy, args.eval_strategy)
        last = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        if control.should_save and more_to_come and last:
            control.should_save, self.waiting = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save, self.waiting = control.should_save or self.waiting, False


class WholeCheckpoints:
    """Mixin before `Trainer`: every checkpoint has a manifest, and only whole ones are resumed from.

    `train(resume_from_checkpoint=True)` takes the newest whole checkpoint of output_dir. A named folder that is damaged is
    replaced by the newest whole checkpoint of an earlier step beside it. Either way one RuntimeWarning says what was
    passed over. A checkpoint of another run is refused (`training.fingerprint`).
    """

    _limit_given: int | None = None
    fingerprint: dict | None = None
    """Of this run; known once `train` has begun."""

    def __init__(self, *args, **kwargs):
        self.finite = FiniteWatch()
        super().__init__(*args, **kwargs)
        self.add_callback(_SaveAfterEpochEnd())

    def _examine(self, folder: Path) -> Verdict:
        """The same verdict on every rank: the ranks that write checkpoints look, because others may not see the files."""
        verdicts = gather_object([examine(folder) if self.args.should_save else None])
        verdicts = [verdict for verdict in verdicts if verdict is not None]
        return next((verdict for verdict in verdicts if verdict.problem is not None), verdicts[0])

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args, **kwargs):
        """As the Trainer's.

        Raises:
            CheckpointError: there is no whole checkpoint to resume from, or it is another run's.
        """
        if self._reference is not None:
            self._reference.cover_steps()
        self.fingerprint, self.finite = fingerprint(self), FiniteWatch()
        if self.args.save_only_model and self.args.save_strategy != "no" and self.is_world_process_zero():
            logger.warning("save_only_model: checkpoints hold no optimizer, so this run cannot be resumed")
        if resume_from_checkpoint:
            resume_from_checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _choose_checkpoint(self, wanted: str | os.PathLike | bool) -> str:
        folders = [candidates(wanted, self.args.output_dir)]
        broadcast_object_list(folders)
        if not folders[0]:
            raise CheckpointError(f"no checkpoint in {self.args.output_dir} to resume from")
        folder, note = choose(folders[0], self._examine)
        world, rank = self.args.world_size, self.args.process_index
        notes = [note] if note else []
        if not self._same_run(folder):
            notes.append(f"{folder} does not say what it was trained on, so nobody has compared that with this run")
        if self.args.ignore_data_skip:
            notes.append("ignore_data_skip starts the epoch again, so rows are seen twice")
        own = folder / ("rng_state.pth" if world == 1 else f"rng_state_{rank}.pth")
        if not all(gather_object([own.is_file()])):
            notes.append(f"it was saved by another number of processes than {world}, so random numbers differ")
        if notes and self.is_world_process_zero():
            start = "" if note else f"resuming from {folder}: "
            warnings.warn(start + "; ".join(notes), RuntimeWarning, stacklevel=4)
        return str(folder)

    def _same_run(self, folder: Path) -> bool:
        """False where a checkpoint has no fingerprint; raises where it is another run's."""
        verdicts: list[list[str] | None] = []
        if self.args.should_save:
            then = read_fingerprint(folder)
            planned = json.loads((folder / "trainer_state.json").read_bytes()).get("max_steps")
            verdicts = [None if then is None else differences(then, self.fingerprint, planned=planned)]
        verdicts = gather_object(verdicts)
        others = sorted({name for names in verdicts for name in names or ()})
        if others:
            raise CheckpointError(
                f"{folder} belongs to another run: {'; '.join(others)}. Resume with what it was trained with, or train in "
                "another output_dir."
            )
        return None not in verdicts

    def _load_callback_state(self) -> None:
        """Restore the callbacks' counters, such as early stopping's, into the objects that the caller passed."""
        saved = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if not isinstance(callback, ExportableState):
                continue
            # The Trainer needs an entry to save into.
            state = saved.setdefault(type(callback).__name__, callback.state())
            if isinstance(state, dict) and not getattr(callback, "restores_itself", False):
                for name, value in state["attributes"].items():
                    setattr(callback, name, value)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at the last step; the Trainer would train one more
            self.control.should_training_stop = True
            return
        with self.finite.stops(self.args, self.state):
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:  # the scaler of float16 leaves such a step out, by design
            self.finite.gradient(norm, self.state.global_step + 1)
        return norm

    def _save_checkpoint(self, model, trial):
        self.finite.check(self.args)
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            begin(folder)
            write_fingerprint(folder, self.fingerprint or fingerprint(self))
        self.accelerator.wait_for_everyone()
        # The Trainer would delete old checkpoints before this one is whole, so it sees no limit.
        self._limit_given = self.args.save_total_limit
        self.state.best_metric = json_numbers(self.state.best_metric)  # else no later metric would be better
        with self._limit(None):
            super()._save_checkpoint(model, trial)
        self._limit_given = None
        if not self.args.push_to_hub:
            self._commit(folder)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(folder.parent, self.args.save_total_limit, [folder] if best is None else [folder, best])

    def log(self, logs, start_time=None):
        """As the Trainer's; the log that is kept is valid JSON, and a training line stops a run that has diverged."""
        if "loss" in logs:
            self.finite.check(self.args)
        super().log(logs, start_time)
        self.state.log_history[-1] = json_numbers(self.state.log_history[-1])

    def _commit(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()  # for the files of every rank
        if self.args.should_save:
            commit(folder)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._commit(Path(checkpoint_folder))  # the copy on the Hub has its manifest too
        with self._limit(self._limit_given):
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, *args, **kwargs):
        with self._limit(
            self._limit_given or self.args.save_total_limit
        ):  # training_args.bin holds the limit that was given
            super()._save(*args, **kwargs)

    @contextlib.contextmanager
    def _limit(self, limit: int | None) -> Iterator[None]:
        before, self.args.save_total_limit = self.args.save_total_limit, limit
        try:
            yield
        finally:
            self.args.save_total_limit = before

    def _finalize_training(self, *args, **kwargs):
        """Do not load a best checkpoint that has been damaged, nor delete the others in its favour."""
        self.finite.check(self.args)
        best = self.state.best_model_checkpoint
        if best is not None and (self.args.load_best_model_at_end or self.args.save_total_limit == 1):
            problem = self._examine(Path(best)).problem
            if problem is not None:
                if self.is_world_process_zero():
                    note = f"{best}: {problem}; the model stays that of the last step"
                    warnings.warn(note, RuntimeWarning, stacklevel=4)
                self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)
