"""What is evaluated: one dataset or several by name, also rows that the constructor has not seen."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.data import DataLoader

from ..data.dataset import FeedbackDataset
from ..data.tokenize import LOAD_OPTIONS, load_feedback
from .checks import check_rows


class EvaluationSets:
    """Mixin before `Trainer`: `evaluate` and `predict` take rows in every form that the constructor takes.

    Of a mapping each dataset is evaluated by itself, its metrics named `eval_NAME_...`. Rows that the constructor has not
    seen get their reference log-probabilities first (`references.Reference.add`).
    """

    _evaluated: FeedbackDataset | None = None

    def _datasets(self, source, args, tokenizer) -> FeedbackDataset | dict[str, FeedbackDataset] | None:
        """Tokenized rows, of several sources by name."""
        if not isinstance(source, Mapping):
            return self._dataset(source, args, tokenizer)
        for name, part in source.items():
            if not isinstance(name, str) or isinstance(part, (Mapping, type(None))):
                raise TypeError(
                    f"eval_dataset maps {name!r} to {type(part).__name__}: of several datasets, map a name to each"
                )
        return {name: self._dataset(part, args, tokenizer) for name, part in source.items()}

    def _dataset(self, source, args, tokenizer, **options) -> FeedbackDataset | None:
        """Tokenized rows of the kind that the objective reads."""
        if source is None:
            return None
        if not isinstance(source, FeedbackDataset):
            options |= {name: getattr(args, name) for name in LOAD_OPTIONS}
            source = load_feedback(source, tokenizer, needs=self.objective.data, progress=not args.disable_tqdm, **options)  # fmt: skip
        check_rows(source, args)
        return source

    def _ready(self, source) -> FeedbackDataset:
        """One dataset with its reference: the constructor's, by its name, or rows."""
        if isinstance(source, str) and isinstance(self.eval_dataset, Mapping) and source in self.eval_dataset:
            source = self.eval_dataset[source]
        dataset = self._dataset(source, self.args, self.processing_class)
        if not self.objective.reference or complete(dataset, self.objective.mismatched):
            return dataset
        if self._reference is None:
            raise ValueError(
                "these rows have no reference log-probabilities, and the reference model was not kept, because the "
                "constructor was given no dataset: pass the rows there, as eval_dataset"
            )
        self._reference.add(dataset)
        return dataset

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and metrics of a dataset, or of each of several.

        Args:
            eval_dataset: what the constructor takes; by default what it was given. The name of one of its datasets, too.
            metric_key_prefix: before every metric; a dataset's name follows it.

        Raises:
            ValueError: there is nothing to evaluate, or rows without a reference, which cannot be computed any more.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, Mapping):  # the Trainer calls this method for each of them
            return super().evaluate(None if eval_dataset is None else dict(given), ignore_keys, metric_key_prefix)
        if given is not None:
            given = self._ready(given)
            self.recorder.begin_evaluation(metric_key_prefix, given)
        return super().evaluate(given, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is not None and not isinstance(dataset, Mapping):
            dataset = self._ready(dataset)
        if dataset is not self._evaluated:  # the Trainer keeps one loader with persistent workers for all of them
            getattr(self, "_eval_dataloaders", {}).clear()
            self._evaluated = dataset
        return super().get_eval_dataloader(dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return super().get_test_dataloader(self._ready(test_dataset))


def complete(dataset: FeedbackDataset, mismatched: bool) -> bool:
    """Whether all that the objective reads of the reference is there."""
    return dataset.has_reference and (not mismatched or (dataset.mismatched is not None and dataset.mismatched.has_reference))  # fmt: skip


def as_list(datasets: FeedbackDataset | Mapping[str, FeedbackDataset] | None) -> list[FeedbackDataset]:
    """The datasets themselves, each once."""
    if datasets is None:
        return []
    return list(datasets.values()) if isinstance(datasets, Mapping) else [datasets]
