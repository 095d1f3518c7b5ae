"""Underlying distribution matching: weights that match the prompts of thumbs down to those of thumbs up.

If the two classes were collected on different prompts, BCO's classifier may learn the prompt instead of the answer. A
logistic regression on prompt embeddings estimates p(up | x); a thumbs-down example gets the weight

    w(x) = clamp(p(up | x) / (1 - p(up | x)), 0.5, 10)

and a thumbs-up one the weight 1 (Jung et al., arXiv 2404.04656 v1; formerly inside TRL's BCOTrainer). This is the density
ratio p(x | up) / p(x | down) only if both classes weigh the same in the regression (`class_weight="balanced"`, as in TRL):
otherwise every weight would carry the factor n_up / n_down, which corrects class balance, not the prompts.

A regression partly memorises the labels of the prompts it was fitted on, and then finds every thumbs down unlikely: even if
prompts say nothing about labels, such weights fall to 0.5 instead of 1. So each prompt is judged by a regression that was
fitted without it. A hash of its text selects which, so a prompt has the same weight in every file; the strength of
regularisation is the one that predicts best out of fold.

This is an offline step: training needs no embedding model, and the state is JSON, never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..files import atomic_text
from .embedders import ModelEmbedder, TfidfEmbedder
from .rows import BadRows, as_text, label_of, weight_of
from .sources import FeedbackError, RowError, as_record, open_source

SCHEMA = 2
FOLDS = 5
INVERSE_REGULARIZATION = (0.01, 0.1, 1.0, 10.0)
"""The values tried for scikit-learn's C."""


@dataclass(frozen=True)
class MatchReport:
    """How far the weights are from 1, and what they cost."""

    rows: int
    thumbs_up: int
    thumbs_down: int
    auc: float | None
    """Of prompts against class, by regressions fitted without the prompt; 0.5: the classes share their prompts and there
    is nothing to match. None when the state was given."""
    auc_low: float | None
    auc_high: float | None
    """Its 95 % interval (`losses.metrics.auc_interval`), which takes every row for a prompt of its own."""
    effective_sample_size: float
    """(Σw)² / Σw² of the thumbs down: the number of unweighted examples with the same variance."""
    effective_sample_size_all: float
    """The same of all rows."""
    mean_density_ratio: float | None
    """Of the thumbs down, before the clamp. Its expectation is 1; a value far from 1 means a poor estimate."""
    clamped: int
    """Thumbs-down weights at one of the two bounds."""


class DensityRatio:
    """An estimate of p(x | up) / p(x | down), fitted or from a state.

    Args:
        embedder: turns prompts into vectors.
        seed: of the folds.
    """

    def __init__(self, embedder: TfidfEmbedder | ModelEmbedder, *, seed: int = 0):
        self.embedder, self.seed = embedder, seed
        self.inverse_regularization: float | None = None
        self._coef = np.empty((0, 0))  # [folds, features]
        self._intercept = np.empty(0)  # [folds]

    def fit(self, prompts: Sequence[str], labels: Sequence[bool]) -> float:
        """Fit one regression for each fold, on the prompts of the other folds.

        Returns:
            The AUC out of fold: pairs of an up and a down are compared within a fold only.

        Raises:
            FeedbackError: only one class, or too few prompts to leave some out.
        """
        up = np.asarray(labels, dtype=bool)
        if up.all() or not up.any():
            raise FeedbackError(f"all {len(up)} rows have label {bool(up[0])}: there is nothing to match")
        fold, folds = self._choose_folds(prompts, up)
        features = self.embedder.fit(prompts)
        balanced = np.where(up, 0.5 / up.mean(), 0.5 / (1 - up.mean()))
        best = math.inf
        for strength in INVERSE_REGULARIZATION:
            coef, intercept = _regressions(features, up, fold, folds, strength)
            logits = _logits(features, fold, coef, intercept)
            loss = float(np.mean(balanced * np.logaddexp(0, np.where(up, -logits, logits))))
            if loss < best:
                best, self.inverse_regularization = loss, strength
                self._coef, self._intercept, chosen = coef, intercept, logits
        return _auc_within(chosen, up, fold)

    def _choose_folds(self, prompts: Sequence[str], up: np.ndarray) -> tuple[np.ndarray, int]:
        """(fold of each prompt, number of folds): the largest number that leaves both classes outside each fold."""
        for folds in range(FOLDS, 1, -1):
            fold = self._fold(prompts, folds)
            if all(0 < up[fold != k].sum() < (fold != k).sum() for k in range(folds)):
                return fold, folds
        distinct = len(set(prompts))
        raise FeedbackError(
            f"{distinct} distinct prompts are too few: both classes must remain without any half of them"
        )

    def _fold(self, prompts: Sequence[str], folds: int) -> np.ndarray:
        salt = self.seed.to_bytes(8, "little", signed=True)
        options = {"digest_size": 8, "salt": salt, "person": b"bco_fast.udm"}
        digests = (hashlib.blake2b(prompt.encode(), **options).digest() for prompt in prompts)
        return np.array([int.from_bytes(digest, "little") % folds for digest in digests], dtype=np.int64)

    def ratio(self, prompts: Sequence[str]) -> np.ndarray:  # [prompts] float64
        """p / (1 - p), before the clamp, by the regression that has not seen the prompt."""
        if self.inverse_regularization is None:
            raise ValueError("fit the density ratio, or load a state, first")
        if not len(prompts):
            return np.empty(0)
        fold = self._fold(prompts, len(self._coef))
        features = self.embedder.embed(prompts)
        return np.exp(np.clip(_logits(features, fold, self._coef, self._intercept), -50, 50))

    def state_dict(self) -> dict:
        """Plain numbers and text."""
        folds = zip(self._coef.tolist(), self._intercept.tolist(), strict=True)
        return {
            "schema": SCHEMA,
            "seed": self.seed,
            "inverse_regularization": self.inverse_regularization,
            "embedder": self.embedder.state_dict(),
            "folds": [{"coef": coef, "intercept": intercept} for coef, intercept in folds],
        }

    @classmethod
    def from_state(cls, state: Mapping, embedder: str | None = None) -> DensityRatio:
        """From `state_dict()` and the embedder that it was fitted with: a folder, or "tfidf", which may be left out.

        Raises:
            FeedbackError: the state is of another schema or embedder, or not complete.
        """
        try:
            if state["schema"] != SCHEMA:
                raise FeedbackError(f"the state is of schema {state['schema']}, not {SCHEMA}")
            kind = state["embedder"]["kind"]
            if kind == "model" and embedder in (None, "tfidf"):
                raise FeedbackError("the state was fitted with a model as embedder: give its folder")
            if kind == "tfidf" and embedder not in (None, "tfidf"):
                raise FeedbackError(f"the state was fitted with tfidf, not with {embedder}")
            made = make_embedder(embedder or "tfidf")
            made.load_state_dict(state["embedder"])
            ratio = cls(made, seed=int(state["seed"]))
            folds = [[fold[name] for fold in state["folds"]] for name in ("coef", "intercept")]
            ratio._coef, ratio._intercept = (np.array(values, dtype=np.float64) for values in folds)
            ratio.inverse_regularization = float(state["inverse_regularization"])
            if ratio._coef.ndim != 2 or len(ratio._coef) < 2 or ratio._coef.shape[1] != made.features:
                raise ValueError(f"coefficients {ratio._coef.shape} for {made.features} features")
            if not (np.isfinite(ratio._coef).all() and np.isfinite(ratio._intercept).all()):
                raise ValueError("a coefficient is not finite")
        except FeedbackError:
            raise
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise FeedbackError(f"the state is not one of bco-fast udm ({error!r})") from None
        return ratio


def make_embedder(name: str) -> TfidfEmbedder | ModelEmbedder:
    """Name: "tfidf", or the folder of a Hugging Face model."""
    return TfidfEmbedder() if name == "tfidf" else ModelEmbedder(name)


def _regressions(features, up: np.ndarray, fold: np.ndarray, folds: int, strength: float):
    """Coefficients [folds, features] and intercepts [folds], each fitted on the other folds."""
    from sklearn.linear_model import LogisticRegression

    options = {"C": strength, "class_weight": "balanced", "max_iter": 5000}
    models = [LogisticRegression(**options).fit(features[fold != k], up[fold != k]) for k in range(folds)]
    return np.stack([model.coef_[0] for model in models]), np.array([float(model.intercept_[0]) for model in models])


def _logits(features, fold: np.ndarray, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:  # [prompts]
    logits = np.empty(len(fold))
    for k in np.unique(fold):
        here = features[fold == k]
        # No matrix product of dense vectors: the rounding of a row would depend on the number of other rows.
        logits[fold == k] = intercept[k] + ((here * coef[k]).sum(1) if isinstance(here, np.ndarray) else here @ coef[k])
    return logits


def _auc_within(logits: np.ndarray, up: np.ndarray, fold: np.ndarray) -> float:
    """Prompts of two folds were judged by two regressions, so they are not compared. NaN without a pair."""
    from sklearn.metrics import roc_auc_score

    won = pairs = 0.0
    for k in np.unique(fold):
        here = fold == k
        n = float(up[here].sum() * (~up[here]).sum())
        if n:
            won, pairs = won + n * float(roc_auc_score(up[here], logits[here])), pairs + n
    return won / pairs if pairs else math.nan


def match_file(
    data: str | os.PathLike,
    output: str | os.PathLike,
    *,
    embedder: str | None = None,
    state: str | os.PathLike | None = None,
    min_density_ratio: float | None = None,
    max_density_ratio: float | None = None,
    seed: int | None = None,
) -> MatchReport:
    """Read thumbs up and down, write them as JSONL with a `weight` column, and the state as OUTPUT.udm.json.

    An existing weight is multiplied; other columns are copied. The same input gives the same bytes.

    Args:
        data: JSONL, a JSON array, CSV or Parquet, with prompt (text or messages) and label.
        embedder: "tfidf", or the folder of a Hugging Face model; not needed with a state of tfidf.
        state: of an earlier call. The rows are weighted by it and its settings; nothing is fitted, only OUTPUT is written.
        min_density_ratio, max_density_ratio: bounds of a thumbs-down weight; default 0.5 and 10.
        seed: of the folds; default 0.

    Raises:
        FeedbackError: a bad row; one class only; too few prompts; a state or embedder that does not fit.
        ValueError: bounds out of order, settings given with a state, no embedder, or output equal to data.
    """
    from ..losses.metrics import auc_interval

    data, output = Path(data), Path(output)
    if not data.is_file():
        raise FeedbackError(f"{data}: no such file")
    if output.exists() and output.samefile(data):
        raise ValueError(f"{output} is the input; write to another file")
    given = {"min_density_ratio": min_density_ratio, "max_density_ratio": max_density_ratio, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    if state is None:
        if embedder is None:
            raise ValueError("embedder is needed: tfidf, or the folder of a model")
        settings = {"min_density_ratio": 0.5, "max_density_ratio": 10.0, "seed": 0} | given
        if not 0 <= settings["seed"] < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), not {settings['seed']}")
        ratio = DensityRatio(make_embedder(embedder), seed=settings["seed"])
    else:
        if given:
            raise ValueError(f"{', '.join(given)} come from the state; to change them, fit again")
        ratio, settings = _read_state(state, embedder)
    low, high = settings["min_density_ratio"], settings["max_density_ratio"]
    if not 0 < low <= high < math.inf:
        raise ValueError(f"min_density_ratio and max_density_ratio must be 0 < min <= max, not {low} and {high}")
    prompts, labels, given_weights = _read(data)
    up = np.array(labels)
    auc = auc_low = auc_high = None
    if state is None:
        auc = ratio.fit(prompts, labels)
        if math.isfinite(auc):
            auc_low, auc_high = auc_interval(auc, int(up.sum()), int((~up).sum()))
    raw = ratio.ratio([prompt for prompt, label in zip(prompts, labels, strict=True) if not label])
    weights = np.array(given_weights)
    weights[~up] *= np.clip(raw, low, high)
    with atomic_text(output) as file:
        file.writelines(_weighted(data, weights))
    report = MatchReport(
        rows=len(up),
        thumbs_up=int(up.sum()),
        thumbs_down=int((~up).sum()),
        auc=auc,
        auc_low=auc_low,
        auc_high=auc_high,
        effective_sample_size=_effective(weights[~up]),
        effective_sample_size_all=_effective(weights),
        mean_density_ratio=float(raw.mean()) if len(raw) else None,
        clamped=int(((raw <= low) | (raw >= high)).sum()),
    )
    if state is None:
        _write_state(Path(f"{output}.udm.json"), ratio, settings, report)
    return report


def _effective(weights: np.ndarray) -> float:
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0


def _read(data: Path) -> tuple[list[str], list[bool], list[float]]:
    """Prompts, labels and weights; every bad row is counted."""
    rows: list[tuple[str, bool, float]] = []
    bad_rows = BadRows(None)
    for where, record in open_source(data).records:
        try:
            rows.append(_row(as_record(record)))
        except RowError as error:
            bad_rows.add(where, error)
    bad_rows.settle(len(rows))
    prompts, labels, weights = map(list, zip(*rows, strict=True))
    return prompts, labels, weights


def _row(record: Mapping) -> tuple[str, bool, float]:
    if record.get("chosen") is not None:
        raise RowError("the two sides of a pair have one prompt, so there is nothing to match")
    try:
        label = label_of(record)
    except RowError as error:
        raise RowError(f"{error}; `bco-fast convert --recipe scores` turns a score into a label") from None
    weight = 1.0 if record.get("weight") is None else weight_of(record)
    prompt = record.get("prompt")
    if isinstance(prompt, list) and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in prompt):
        prompt = "\n".join(message["content"] for message in prompt)
    return as_text(prompt, "prompt", "a string, or messages with a content"), label, weight


def _weighted(data: Path, weights: np.ndarray) -> Iterator[str]:
    for (where, record), weight in zip(open_source(data).records, weights, strict=True):
        try:
            line = json.dumps({**record, "weight": float(weight)}, ensure_ascii=False)
            line.encode()
        except (TypeError, ValueError) as error:
            raise FeedbackError(f"{where}: cannot be written as JSON ({error})") from None
        yield line + "\n"


def _write_state(path: Path, ratio: DensityRatio, settings: dict, report: MatchReport) -> None:
    import sklearn

    from .. import __version__

    state = ratio.state_dict() | {name: settings[name] for name in ("min_density_ratio", "max_density_ratio")}
    state["versions"] = {"bco_fast": __version__, "scikit-learn": sklearn.__version__, "numpy": np.__version__}
    state["fitted_on"] = as_summary(report)
    with atomic_text(path) as file:
        file.write(json.dumps(state, sort_keys=True, ensure_ascii=False) + "\n")


def _read_state(path: str | os.PathLike, embedder: str | None) -> tuple[DensityRatio, dict]:
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        ratio = DensityRatio.from_state(state, embedder)
        return ratio, {name: float(state[name]) for name in ("min_density_ratio", "max_density_ratio")}
    except FeedbackError as error:
        raise FeedbackError(f"{path}: {error}") from None
    except OSError as error:
        raise FeedbackError(f"{path}: {error.strerror or error}") from None
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise FeedbackError(f"--state {path}: not a state of bco-fast udm ({error!r})") from None


def describe(report: MatchReport) -> str:
    """The report as three lines of text."""
    auc = "not measured"
    if report.auc_low is not None:
        auc = f"{report.auc:.3f} [{report.auc_low:.3f}, {report.auc_high:.3f}] (0.5: the classes share their prompts)"
    return (
        f"{report.rows} rows: {report.thumbs_up} up, {report.thumbs_down} down\n"
        f"AUC of prompt against class, out of fold: {auc}\n"
        f"effective sample size of the thumbs down: {report.effective_sample_size:.1f} of {report.thumbs_down}, "
        f"{report.clamped} weights at a bound"
    )


def as_summary(report: MatchReport) -> dict:
    """Plain numbers, rounded; null where there is none."""
    values = asdict(report).items()
    floats = {name: round(v, 6) if math.isfinite(v) else None for name, v in values if isinstance(v, float)}
    return dict(values) | floats
