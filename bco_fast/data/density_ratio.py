"""Underlying distribution matching: thumbs-down examples weighted to the prompts that thumbs up come from.

Where the two classes were collected on different prompts, BCO's classifier may learn the prompt instead of the answer. A
logistic regression on prompt embeddings estimates p(up | x); a thumbs-down example counts

    w(x) = clamp(p(up | x) / (1 - p(up | x)), 0.5, 10)

times, a thumbs-up one once (Jung et al., arXiv 2404.04656 v1; formerly inside TRL's BCOTrainer). For that to be the ratio of
densities p(x | up) / p(x | down) the two classes must weigh the same in the regression, as they do in TRL's
(`class_weight="balanced"`): otherwise every weight would carry the factor n_up / n_down, which is balance, not matching.

What is different here, and why: a regression that has seen a prompt's label has partly learned it by heart, and then finds
every thumbs down unlikely: on prompts that have nothing to do with the labels such weights fall to 0.5 instead of 1. So a
prompt is judged by a regression that was fitted without it. A hash of its text decides by which, so that the same prompt
weighs the same in every file, and the strength of regularisation is the one that predicts best out of fold.

It is an offline step: training needs no embedding model, and the state is JSON, never a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..files import atomic_text
from .embedders import Embedder, ModelEmbedder, TfidfEmbedder
from .sources import FeedbackError, Flaw, open_source

SCHEMA = 2
FOLDS = 5
INVERSE_REGULARIZATION = (0.01, 0.1, 1.0, 10.0)
"""What is tried; scikit-learn's C."""


@dataclass(frozen=True)
class MatchReport:
    """What the weights amount to."""

    rows: int
    thumbs_up: int
    thumbs_down: int
    auc: float | None
    """Of prompts against class, by regressions that were fitted without the prompt; 0.5: the classes share their prompts,
    there is nothing to match. None when the state was given."""
    effective_sample_size: float
    """(Σw)² / Σw² of the thumbs down: so many unweighted examples carry as much."""
    effective_sample_size_all: float
    """The same of all rows."""
    mean_density_ratio: float | None
    """Of the thumbs down, before the clamp; 1 in expectation, far from it the estimate is poor."""
    clamped: int
    """Thumbs-down weights at one of the two bounds."""


class DensityRatio:
    """An estimate of p(x | up) / p(x | down), fitted or from a state.

    Args:
        embedder: what makes vectors of prompts.
        seed: of the folds.
    """

    def __init__(self, embedder: Embedder, *, seed: int = 0):
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
        """(fold of each prompt, how many), as many as leave both classes outside of each."""
        for folds in range(FOLDS, 1, -1):
            fold = self._fold(prompts, folds)
            if all(0 < up[fold != k].sum() < (fold != k).sum() for k in range(folds)):
                return fold, folds
        raise FeedbackError(
            f"{len(set(prompts))} distinct prompts are too few: without any half of them, both classes must be left"
        )

    def _fold(self, prompts: Sequence[str], folds: int) -> np.ndarray:
        def number(prompt: str) -> int:
            salt = self.seed.to_bytes(8, "little", signed=True)
            digest = hashlib.blake2b(prompt.encode(), digest_size=8, salt=salt, person=b"bco_fast.udm").digest()
            return int.from_bytes(digest, "little") % folds

        return np.array([number(prompt) for prompt in prompts], dtype=np.int64)

    def ratio(self, prompts: Sequence[str]) -> np.ndarray:  # [prompts] float64
        """p / (1 - p), before any clamp; of a prompt it was fitted on, by the regression that has not seen it."""
        if self.inverse_regularization is None:
            raise ValueError("fit the density ratio, or load a state, first")
        if not len(prompts):
            return np.empty(0)
        fold = self._fold(prompts, len(self._coef))
        features = self.embedder.embed(prompts)
        return np.exp(np.clip(_logits(features, fold, self._coef, self._intercept), -50, 50))

    def state_dict(self) -> dict:
        """Plain numbers and text."""
        return {
            "schema": SCHEMA,
            "seed": self.seed,
            "inverse_regularization": self.inverse_regularization,
            "embedder": self.embedder.state_dict(),
            "folds": [
                {"coef": coef.tolist(), "intercept": float(intercept)}
                for coef, intercept in zip(self._coef, self._intercept, strict=True)
            ],
        }

    @classmethod
    def from_state(cls, state: Mapping, embedder: str | None = None) -> DensityRatio:
        """
        Args:
            embedder: "tfidf" or a folder; must be what the state was fitted with. Only tfidf needs none.

        Raises:
            FeedbackError: the state is of another schema or embedder, or not whole.
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
            ratio._coef = np.array([fold["coef"] for fold in state["folds"]], dtype=np.float64)
            ratio._intercept = np.array([fold["intercept"] for fold in state["folds"]], dtype=np.float64)
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


def make_embedder(name: str) -> Embedder:
    """Name: "tfidf", or the folder of a Hugging Face model."""
    return TfidfEmbedder() if name == "tfidf" else ModelEmbedder(name)


def _regressions(features, up: np.ndarray, fold: np.ndarray, folds: int, strength: float):
    """Coefficients [folds, features] and intercepts [folds], each fitted on the other folds."""
    from sklearn.linear_model import LogisticRegression

    models = [
        LogisticRegression(C=strength, class_weight="balanced", max_iter=5000).fit(features[fold != k], up[fold != k])
        for k in range(folds)
    ]
    return np.stack([model.coef_[0] for model in models]), np.array([float(model.intercept_[0]) for model in models])


def _logits(features, fold: np.ndarray, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:  # [prompts]
    logits = np.empty(len(fold))
    for k in np.unique(fold):
        here = features[fold == k]
        # Of dense vectors no matrix product: the rounding of one row would depend on how many others there are.
        logits[fold == k] = intercept[k] + ((here * coef[k]).sum(1) if isinstance(here, np.ndarray) else here @ coef[k])
    return logits


def _auc_within(logits: np.ndarray, up: np.ndarray, fold: np.ndarray) -> float:
    """Pairs from two folds were judged by two regressions, so they are not compared. NaN without a pair."""
    from sklearn.metrics import roc_auc_score

    won = pairs = 0.0
    for k in np.unique(fold):
        here = fold == k
        n = float(up[here].sum() * (~up[here]).sum())
        if n:
            won, pairs = won + n * float(roc_auc_score(up[here], logits[here])), pairs + n
    return won / pairs if pairs else math.nan


# ---- files


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

    A weight that is there already is multiplied; other columns stay. The same input gives the same bytes.

    Args:
        data: JSONL, a JSON array, CSV or Parquet, with prompt (text or messages) and label.
        embedder: "tfidf", or the folder of a Hugging Face model; with a state of tfidf none is needed.
        state: of an earlier call; the rows are weighted by it and its settings, nothing is fitted or written but OUTPUT.
        min_density_ratio, max_density_ratio: bounds of a thumbs-down weight; default 0.5 and 10.
        seed: of the folds; default 0.

    Raises:
        FeedbackError: a bad row; one class only; too few prompts; a state or embedder that does not fit.
        ValueError: bounds out of order, settings beside a state, no embedder, or output is data.
    """
    data, output = Path(data), Path(output)
    if not data.is_file():
        raise FeedbackError(f"{data}: no such file")
    if output.exists() and output.samefile(data):
        raise ValueError(f"{output} is the input; write to another file")
    given = {"min_density_ratio": min_density_ratio, "max_density_ratio": max_density_ratio, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    auc = None
    if state is None:
        if embedder is None:
            raise ValueError("embedder is needed: tfidf, or the folder of a model")
        settings = {"min_density_ratio": 0.5, "max_density_ratio": 10.0, "seed": 0} | given
        ratio = DensityRatio(make_embedder(embedder), seed=settings["seed"])
    else:
        if given:
            raise ValueError(f"{', '.join(given)} come from the state; fit anew to change them")
        ratio, settings = _read_state(state, embedder)
    low, high = settings["min_density_ratio"], settings["max_density_ratio"]
    if not 0 < low <= high < math.inf:
        raise ValueError(f"density ratios must be 0 < min <= max, not {low} and {high}")
    rows = _read(data)
    prompts, up = [row.prompt for row in rows], np.array([row.label for row in rows])
    if state is None:
        auc = ratio.fit(prompts, up.tolist())
    raw = ratio.ratio([row.prompt for row in rows if not row.label])
    matched = np.ones(len(rows))
    matched[~up] = np.clip(raw, low, high)
    weights = matched * np.array([row.weight for row in rows])
    with atomic_text(output) as file:
        file.writelines(_weighted(data, weights))
    report = MatchReport(
        rows=len(rows),
        thumbs_up=int(up.sum()),
        thumbs_down=int((~up).sum()),
        auc=auc,
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


@dataclass(frozen=True)
class _Row:
    prompt: str
    label: bool
    weight: float


def _records(data: Path) -> Iterator[tuple[str, object]]:
    stream = open_source(data, ("prompt", "label", "weight"))
    if stream.columns is not None:  # of a table every column is to be kept
        stream = open_source(data, stream.columns)
    for where, record in stream.records:
        yield where, record if stream.typed or isinstance(record, Flaw) else _typed(record)


def _typed(record: Mapping[str, str]) -> dict:
    """A row of CSV, where everything is text."""
    values: dict = dict(record)
    truth = {"true": True, "1": True, "false": False, "0": False, "": None}
    for name in {"label", "kto_tag"} & values.keys():
        values[name] = truth.get(values[name].lower(), values[name])
    if "weight" in values:
        with contextlib.suppress(ValueError):  # refused as it stands, by its row
            values["weight"] = float(values["weight"] or 1.0)
    return values


def _read(data: Path) -> list[_Row]:
    rows, bad = [], []
    for where, record in _records(data):
        try:
            rows.append(_row(record))
        except Flaw as flaw:
            bad.append(f"{where}: {flaw}")
    if bad:
        more = f" (and {len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
        raise FeedbackError(f"{bad[0]}{more}")
    if not rows:
        raise FeedbackError(f"{data}: no row")
    return rows


def _row(record) -> _Row:
    if isinstance(record, Flaw):
        raise record
    if not isinstance(record, Mapping):
        raise Flaw(f"a row must be an object, not {type(record).__name__}")
    if record.get("chosen") is not None:
        raise Flaw("the two sides of a pair have one prompt, so there is nothing to match")
    label = record.get("label", record.get("kto_tag"))
    if not isinstance(label, bool):
        what = "column 'label' is missing" if label is None else f"label must be true or false, not {label!r}"
        raise Flaw(f"{what}; of a score `bco-fast convert --recipe scores` makes one")
    weight = 1.0 if record.get("weight") is None else record["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e300:
        raise Flaw(f"weight must be a number >= 0, not {weight!r}")
    return _Row(_text(record.get("prompt")), label, float(weight))


def _text(prompt) -> str:
    """Of a chat, what the messages say, one after another."""
    if isinstance(prompt, list) and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in prompt):
        prompt = "\n".join(message["content"] for message in prompt)
    if not isinstance(prompt, str):
        raise Flaw("prompt must be a string, or messages with a content")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise Flaw("prompt has a lone surrogate, which is no text") from None
    return prompt


def _weighted(data: Path, weights: np.ndarray) -> Iterator[str]:
    for (where, record), weight in zip(_records(data), weights, strict=True):
        try:
            line = json.dumps({**record, "weight": float(weight)}, ensure_ascii=False)
            line.encode()
        except (TypeError, ValueError) as error:
            raise FeedbackError(f"{where}: cannot be written as JSON ({error})") from None
        yield line + "\n"


def _write_state(path: Path, ratio: DensityRatio, settings: dict, report: MatchReport) -> None:
    import sklearn

    from .. import __version__

    versions = {"bco_fast": __version__, "scikit-learn": sklearn.__version__, "numpy": np.__version__}
    bounds = {name: settings[name] for name in ("min_density_ratio", "max_density_ratio")}
    with atomic_text(path) as file:
        json.dump(
            {**ratio.state_dict(), **bounds, "versions": versions, "fitted_on": as_summary(report)},
            file, sort_keys=True, ensure_ascii=False,
        )  # fmt: skip
        file.write("\n")


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
        raise FeedbackError(f"{path}: the state is not one of bco-fast udm ({error!r})") from None


def describe(report: MatchReport) -> str:
    """The report for a person."""
    auc = "not measured" if report.auc is None else f"{report.auc:.3f} (0.5: the classes share their prompts)"
    return (
        f"{report.rows} rows: {report.thumbs_up} up, {report.thumbs_down} down\n"
        f"AUC of prompt against class, out of fold: {auc}\n"
        f"effective sample size of the thumbs down: {report.effective_sample_size:.1f} of {report.thumbs_down}, "
        f"{report.clamped} weights at a bound"
    )


def as_summary(report: MatchReport) -> dict:
    """Plain numbers, rounded; null where there is none."""

    def plain(value):
        if not isinstance(value, float):
            return value
        return round(value, 6) if math.isfinite(value) else None

    return {name: plain(value) for name, value in asdict(report).items()}
