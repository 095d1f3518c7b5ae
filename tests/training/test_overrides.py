"""What our trainers override of the Trainer's private methods: as little as can be, and a rename there fails here."""

import pytest
from transformers import Trainer

from bco_fast import FeedbackTrainer, OnlineFeedbackTrainer
from bco_fast.training.resume import WholeCheckpoints

PRIVATE = {
    FeedbackTrainer: {
        "_get_train_sampler": "the order of rows has no public hook",
        "_save_checkpoint": "the log windows of all ranks are added up first, by all ranks",
    },
    OnlineFeedbackTrainer: {"_get_train_sampler": "rows are numbers here, and come in their order"},
    WholeCheckpoints: {
        "_load_callback_state": "the Trainer restores no state into callbacks that were passed in",
        "_run_epoch": "a run resumed at its last step would do one more",
        "_get_grad_norm": "the norm exists there only, and must be finite",
        "_save_checkpoint": "the manifest comes last, and older checkpoints go only after it",
        "_push_from_checkpoint": "the copy on the Hub has its manifest too",
        "_save": "training_args.bin holds the limit that was asked for",
        "_finalize_training": "a best checkpoint that is damaged must not be loaded",
    },
}


@pytest.mark.parametrize("trainer", PRIVATE, ids=lambda t: t.__name__)
def test_private_methods_of_the_trainer_that_are_overridden(trainer):
    ours = {name for name in vars(trainer) if name.startswith("_") and not name.startswith("__")}
    overridden = {name for name in ours if hasattr(Trainer, name)}
    assert overridden == set(PRIVATE[trainer])


def test_the_hooks_of_an_optimizer_step_are_the_trainers():
    """Public, and called with these arguments; `loss_is_scaled_for_ga` says that we have normalised the loss."""
    import inspect

    assert list(inspect.signature(Trainer.get_batch_samples).parameters)[1:] == [
        "epoch_iterator",
        "num_batches",
        "device",
    ]
    assert "num_items_in_batch" in inspect.signature(Trainer.compute_loss).parameters
    assert hasattr(Trainer, "loss_is_scaled_for_ga")
