"""Distribution matching inside `BCOTrainer`: weights of thumbs down from the user's embeddings of prompts, computed once.

TRL embedded the prompts of every training batch again. Here each distinct prompt is embedded once, in the constructor, and
the embedding model is not needed afterwards. The estimate is that of `bco-fast udm` (`data.density_ratio`).
"""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.chat import with_template
from ..data.dataset import FeedbackDataset
from ..data.density_ratio import DensityRatio
from ..data.rows import FeedbackRow, read_rows, unpair
from ..data.tokenize import tokenize_rows

logger = logging.getLogger("bco_fast")
_READING = ("on_bad_row", "columns", "labels")


class FunctionEmbedder:
    """Vectors of prompts by a function of tokens, each distinct prompt once.

    Args:
        function: called with `input_ids` and `attention_mask` [B, T]; returns vectors [B, D].
        tokenizer: makes these tokens, without special tokens, as TRL did.
        batch_size: prompts in a call, B.
        device: of the tokens.
    """

    def __init__(self, function: Callable, tokenizer, batch_size: int, device):
        self.function, self.tokenizer = function, tokenizer
        self.batch_size, self.device = batch_size, device
        self.features = 0
        self._known: dict[str, np.ndarray] = {}

    def embed(self, texts: Sequence[str]) -> np.ndarray:  # [texts, D] float64
        limit = self.tokenizer.model_max_length  # 1e30: none is known
        cut = {"truncation": True, "max_length": limit} if limit < 1 << 20 else {}
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        ids = self.tokenizer(new, add_special_tokens=False, **cut)["input_ids"] if new else []
        order = sorted((i for i in range(len(new)) if ids[i]), key=lambda i: len(ids[i]))  # little padding
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            for i, vector in zip(batch, self._vectors([ids[i] for i in batch]), strict=True):
                self._known[new[i]] = vector
        for text in new:
            self._known.setdefault(text, np.zeros(self.features))  # no token, so nothing to embed
        return np.stack([self._known[text] for text in texts])

    fit = embed

    def _vectors(self, ids: list[list[int]]) -> np.ndarray:  # [B, D]
        rows = [torch.tensor(row, device=self.device) for row in ids]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)  # [B, T]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.no_grad():
            vectors = self.function(input_ids=tokens, attention_mask=mask)
        if not isinstance(vectors, torch.Tensor) or vectors.dim() != 2 or len(vectors) != len(ids):
            found = tuple(vectors.shape) if isinstance(vectors, torch.Tensor) else type(vectors).__name__
            raise ValueError(f"embedding_func must return a tensor [{len(ids)}, D] for {len(ids)} prompts, not {found}")
        vectors = vectors.detach().double().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise ValueError("embedding_func returned a vector that is not finite")
        self.features = vectors.shape[1]
        return vectors


class PromptMatching:
    """Weights by the density ratio p(x | up) / p(x | down) of prompts.

    Args:
        function, tokenizer: see `FunctionEmbedder`.
        args: a `BCOConfig`: the size of the sample, the bounds, the options of reading rows, the seed.

    Raises:
        ValueError: no tokenizer, or the objective does not read thumbs.
        ImportError: scikit-learn is missing.
    """

    def __init__(self, function: Callable, tokenizer, args):
        if importlib.util.find_spec("sklearn") is None:
            raise ImportError("embedding_func fits a regression with scikit-learn: pip install 'bco_fast[data]'")
        if tokenizer is None:
            raise ValueError("embedding_func needs embedding_tokenizer, which makes the tokens it reads")
        if args.objective.data != "labels":
            raise ValueError(f"embedding_func weighs thumbs down, and {args.loss_type} reads {args.objective.data}")
        self.args = args
        self.embedder = FunctionEmbedder(function, tokenizer, args.per_device_train_batch_size, args.device)

    def weighted(
        self, train, held_out, tokenizer
    ) -> tuple[FeedbackDataset, FeedbackDataset | dict[str, FeedbackDataset] | None]:
        """Both datasets tokenized, their thumbs down weighted by a ratio fitted on the training rows.

        Args:
            train, held_out: what `read_rows` takes; held_out may be None, or several by name.
            tokenizer: of the policy.

        Raises:
            FeedbackError: a bad row, one class only, or too few prompts.
            TypeError: a `FeedbackDataset`, which holds no text.
        """
        rows = self._rows(train, self.args.pairing_ratio)
        ratio = DensityRatio(self.embedder, seed=self.args.seed)
        sample = self._sample(rows)
        auc = ratio.fit([_prompt(row) for row in sample], [row.label for row in sample])
        logger.info(
            "distribution matching: AUC of prompt against class, out of fold, on %d rows: %.3f (0.5: shared prompts)",
            len(sample), auc,
        )  # fmt: skip
        tokenizer = with_template(tokenizer, self.args.chat_template)
        weighted = self._tokenized(self._weigh(rows, ratio), tokenizer)
        if held_out is None:
            return weighted, None
        sets = held_out if isinstance(held_out, Mapping) else {"": held_out}
        made = {k: self._tokenized(self._weigh(self._rows(rows), ratio), tokenizer) for k, rows in sets.items()}
        return weighted, made if isinstance(held_out, Mapping) else made[""]

    def _rows(self, source, pairing_ratio: float = 1.0) -> list[FeedbackRow]:
        if isinstance(source, FeedbackDataset):
            raise TypeError("embedding_func reads prompts as text: pass rows instead of a FeedbackDataset")
        if source is None:
            raise ValueError("embedding_func needs train_dataset, whose prompts the density ratio is fitted on")
        return unpair(read_rows(source, **{name: getattr(self.args, name) for name in _READING}), pairing_ratio)

    def _sample(self, rows: Sequence[FeedbackRow]) -> list[FeedbackRow]:
        """At most `prompt_sample_size` rows of each class."""
        draw, most = random.Random(self.args.seed), self.args.prompt_sample_size  # noqa: S311
        sample = []
        for up in (True, False):
            of_class = [row for row in rows if row.label is up]
            sample += of_class if len(of_class) <= most else draw.sample(of_class, most)
        return sample

    def _weigh(self, rows: Sequence[FeedbackRow], ratio: DensityRatio) -> list[FeedbackRow]:
        down = [i for i, row in enumerate(rows) if not row.label]
        low, high = self.args.min_density_ratio, self.args.max_density_ratio
        weights = np.clip(ratio.ratio([_prompt(rows[i]) for i in down]), low, high)
        weighted = list(rows)
        for i, weight in zip(down, weights.tolist(), strict=True):
            weighted[i] = replace(rows[i], weight=rows[i].weight * weight)
        if down:
            logger.info(
                "distribution matching: %d thumbs down weigh %.3g on average, %d of them at a bound (%g, %g)",
                len(down), weights.mean(), int(((weights <= low) | (weights >= high)).sum()), low, high,
            )  # fmt: skip
        return weighted

    def _tokenized(self, rows: Sequence[FeedbackRow], tokenizer) -> FeedbackDataset:
        names = ("max_length", "max_prompt_length", "max_completion_length", "on_bad_row")
        options = {name: getattr(self.args, name) for name in names}
        return tokenize_rows(rows, tokenizer, progress=not self.args.disable_tqdm, **options)


def _prompt(row: FeedbackRow) -> str:
    """As `bco-fast udm` reads it: of a chat, the contents of its messages."""
    if isinstance(row.prompt, str):
        return row.prompt
    return "\n".join(message.get("content", "") for message in row.prompt)  # a call of a tool may have none
