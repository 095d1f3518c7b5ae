"""Ctrl-C and SIGTERM while a command trains: the step ends, a checkpoint is saved, then the command stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch.distributed as dist
from torch import tensor
from transformers import Trainer, TrainerCallback

from ..reference.ranks import number_of_ranks
from .common import Terminated

_KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class StopAfterStep(TrainerCallback):
    """A context in which the first signal asks for a checkpoint, and the second Ctrl-C stops at once.

    Before the first step a signal stops at once too: there is nothing to save. A launcher passes a signal on, often as
    another one, so a SIGTERM after a Ctrl-C is not a second request.

    Ranks get a signal at different moments and must stop at the same step. They agree by an all-reduce on the CPU that
    runs beside the step, so no step waits for it and the stop comes one step later.

    Raises:
        KeyboardInterrupt, Terminated: once the checkpoint is whole.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.asked: int | None = None
        self.training = False
        self._stopping = False
        self._owner = os.getpid()
        self._before: dict[int, Callable] = {}
        self._group = dist.new_group(backend="gloo") if number_of_ranks() > 1 else None
        self._pending: tuple | None = None

    def __enter__(self) -> StopAfterStep:
        # without an optimizer in the checkpoint nothing could continue from it
        if not self.trainer.args.save_only_model:
            self.trainer.add_callback(self)
            for number in _KINDS:
                try:
                    self._before[number] = signal.signal(number, self._signal)
                except ValueError:  # not the main thread: its owner handles signals
                    break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            self.trainer.remove_callback(self)

    def _signal(self, number: int, frame) -> None:
        if os.getpid() != self._owner:  # a worker of the data loader, forked with this handler
            if number == signal.SIGTERM and self.asked:  # a scheduler sends one to every process, the loader a second
                os._exit(143)
            self.asked = number
            return
        if not self.training or (number == signal.SIGINT == self.asked):
            raise _KINDS[number]
        if self.asked is None:
            self.asked = number
            if self.trainer.is_world_process_zero():
                word = "interrupted" if number == signal.SIGINT else "terminated"
                hint = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                # print is not reentrant, and a signal may arrive inside one
                os.write(2, f"\nbco-fast: {word}: a checkpoint is saved at the end of this step{hint}\n".encode())

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        # before `on_step_end`, where a save at the end of an epoch is put off until its evaluation is done
        self._stopping = self._stopping or self._stop_agreed()
        control.should_save = control.should_save or self._stopping

    def on_save(self, args, state, control, **kwargs):
        if self._stopping:
            raise _KINDS[self.asked or signal.SIGTERM]

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def _stop_agreed(self) -> bool:
        if self._group is None:
            return self.asked is not None
        before = self._pending
        flag = tensor([int(self.asked is not None)])
        self._pending = flag, dist.all_reduce(flag, group=self._group, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])
