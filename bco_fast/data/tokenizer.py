"""Questions that several rooms ask of a tokenizer or of a model's config: EOS, padding, positions, special tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

logger = logging.getLogger("bco_fast")


def pad_or_eos(tokenizer) -> int | None:
    """The padding token, or EOS where there is none. Padding is masked, so its id does not matter."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def open_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that something follows: without the EOS that some tokenizers append to every text."""
    eos, encoded = tokenizer.eos_token_id, tokenizer(list(texts), return_attention_mask=False)["input_ids"]
    return [
        ids[:-1] if ids and eos is not None and ids[-1] == eos and not text.endswith(tokenizer.eos_token) else ids
        for ids, text in zip(encoded, texts, strict=True)
    ]


def text_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of text from outside: no special token is added, and the characters of one stay characters."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return tokenizer(list(texts), **options)["input_ids"]


def warn_of_control_texts(tokenizer, prompts: Sequence[str]) -> None:
    """Log how many prompts, as plain strings, hold the text of a special token.

    They are read as training reads the prompt of a string row, where a rendered template keeps its special tokens.
    """
    specials = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)")
    count = sum(specials.search(prompt) is not None for prompt in prompts)
    if count:
        logger.warning(
            "%d of %d prompts hold special tokens as text, which become special tokens, as in training; in chat messages "
            "they would stay text",
            count,
            len(prompts),
        )


def positions(model) -> int | None:
    """Tokens of the longest sequence that a model takes, or None if its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def special_tokens(tokenizer) -> dict[str, int]:
    """{text: id} of every token that controls the model; text of a message must never become one of them."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    added = {str(token): index for index, token in added if token.special}
    return added | dict(zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=True))
