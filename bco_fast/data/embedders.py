"""Vectors of prompts for distribution matching: tf-idf, or a language model. A vector depends on its own text only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .sources import FeedbackError, one_line

MAX_TERMS = 20_000


class TfidfEmbedder:
    """(1 + log count) · idf of the most frequent words, of length 1; needs no model."""

    def __init__(self) -> None:
        self.features = 0
        self._vectorizer = None

    def fit(self, texts: Sequence[str]):
        """Learn from the texts; -> their vectors [texts, features], sparse."""
        self._vectorizer = _vectorizer(max_features=MAX_TERMS)
        try:
            vectors = self._vectorizer.fit_transform(texts)
        except ValueError:
            raise FeedbackError("no prompt has a word of two letters, so tfidf cannot tell them apart") from None
        self.features = vectors.shape[1]
        return vectors

    def embed(self, texts: Sequence[str]):
        return self._vectorizer.transform(texts)

    def state_dict(self) -> dict:
        terms = self._vectorizer.get_feature_names_out().tolist()
        return {"kind": "tfidf", "terms": terms, "idf": self._vectorizer.idf_.tolist()}

    def load_state_dict(self, state: Mapping) -> None:
        terms, idf = state["terms"], np.array(state["idf"], dtype=np.float64)
        if not all(isinstance(term, str) for term in terms) or idf.shape != (len(terms),) or not np.isfinite(idf).all():
            raise ValueError("terms and idf do not fit together")
        self._vectorizer = _vectorizer(vocabulary={term: index for index, term in enumerate(terms)})
        self._vectorizer.idf_ = idf
        self.features = len(terms)


def _vectorizer(**options):
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, **options)


class ModelEmbedder:
    """Mean of a Hugging Face model's last hidden states over the tokens of the text, of length 1.

    No network, no code from the folder, weights from safetensors only. Texts longer than the model's positions are cut at
    the end. One text at a time: in a padded batch the rounding of a vector depends on the other texts.

    Args:
        path: the model's folder.

    Raises:
        FeedbackError: it is not the folder of a usable model.
    """

    def __init__(self, path: str):
        if not Path(path).is_dir():
            raise FeedbackError(f"--embedder {path}: neither tfidf nor a folder")
        import torch
        from transformers import AutoModel, AutoTokenizer

        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, **local)
            model = AutoModel.from_pretrained(path, **local, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise FeedbackError(f"--embedder {path}: {one_line(error)}") from None
        if model.config.is_encoder_decoder:
            raise FeedbackError(f"--embedder {path}: an encoder-decoder model has no single last hidden state")
        self._known: dict[str, np.ndarray] = {}
        self._digest = _digest(model, self._tokenizer)
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        # RoBERTa counts more positions than a text may have; some tokenizers claim 1e30.
        positions = getattr(model.config, "max_position_embeddings", None) or 512
        self._limit = int(min(self._tokenizer.model_max_length, positions))
        self.features = int(model.config.get_text_config().hidden_size)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        for text in texts:
            if text not in self._known:
                self._known[text] = self._vector(text)
        return np.stack([self._known[text] for text in texts])

    fit = embed

    def _vector(self, text: str) -> np.ndarray:  # [features] float64
        import torch

        ids = self._tokenizer(text, truncation=True, max_length=self._limit)["input_ids"]
        if not ids:
            return np.zeros(self.features)
        tokens = torch.tensor([ids], device=self._model.device)
        with torch.no_grad():
            hidden = self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return torch.nn.functional.normalize(hidden[0].double().mean(0), dim=0).cpu().numpy()

    def state_dict(self) -> dict:
        return {"kind": "model", "digest": self._digest, "features": self.features}

    def load_state_dict(self, state: Mapping) -> None:
        if state["digest"] != self._digest:
            raise FeedbackError("the state was fitted on another embedder: weights or vocabulary differ")


def _digest(model, tokenizer) -> str:
    """Of the weights and the vocabulary."""
    import torch

    digest = hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
