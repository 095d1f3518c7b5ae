"""Explicit rewards of completions: a sequence-classification model, or a Python function.

    def reward(prompts: list[str], completions: list[str], **columns) -> list[float]

has the signature of TRL's `reward_funcs`: it is called by keyword, `columns` are the further columns of the prompts, one
value per prompt, and it returns one finite number per completion; more is better. If prompts are chats, a prompt is a list
of messages and a completion a list of one message. Any other result is an error that names a prompt.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..data.chat import ChatEncoder
from ..data.sources import one_line
from ..data.tokenize import fit
from ..data.tokenizer import open_ids, pad_or_eos, positions, text_ids, warn_of_control_texts
from ..models.load import load_tokenizer
from ..reference.identity import reference_id

logger = logging.getLogger("bco_fast")

Reward = Callable[..., Sequence[float]]


class RewardError(ValueError):
    """A reward that cannot be used; names the prompt and the reason."""


def _named(prompts: Sequence[str], index: int) -> str:
    text = str(prompts[index])
    return f"prompt {index} ({text[:60]!r}{'...' if len(text) > 60 else ''})"


def check_rewards(prompts: Sequence[str], rewards: Sequence[float]) -> list[float]:
    """The rewards as Python floats; there must be one finite number for each prompt.

    Args:
        rewards: a list, or a one-dimensional array or tensor; booleans count 0 and 1.

    Raises:
        RewardError: not a list, of the wrong length, or a reward that is not a finite number; names the first such
            prompt by its index and its first 60 characters.
    """
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not isinstance(rewards, Sequence) or isinstance(rewards, (str, bytes)):
        raise RewardError(f"rewards must be a list with one number per prompt, not {type(rewards).__name__}")
    if len(rewards) != len(prompts):
        few = len(rewards) < len(prompts)
        where = f"; the first without one is {_named(prompts, len(rewards))}" if few else ""
        if prompts and not few:
            where = f"; the last prompt is {_named(prompts, len(prompts) - 1)}"
        raise RewardError(f"{len(rewards)} rewards for {len(prompts)} prompts{where}")
    checked = []
    for index, reward in enumerate(rewards):
        try:
            value = math.nan if isinstance(reward, (str, bytes)) else float(reward)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise RewardError(f"the reward of {_named(prompts, index)} is {reward!r}, not a finite number")
        checked.append(value)
    return checked


def score(reward: Reward, /, prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """Call a reward and check what it returns.

    Args:
        reward: called as reward(prompts=, completions=, **columns).
        columns: lists with one value per prompt; anything else is passed on unchanged.

    Returns:
        One finite float per completion.

    Raises:
        RewardError: the lists differ in length, the reward raised, or what `check_rewards` refuses. If it raised, it is
            called again for one prompt at a time, up to the one that fails.
    """
    prompts, completions = list(prompts), list(completions)
    for name, column in {"completions": completions, **columns}.items():
        if isinstance(column, list) and len(column) != len(prompts):
            raise RewardError(f"{len(prompts)} prompts, but {name} has {len(column)} values")
    if not prompts:
        return []
    try:
        rewards = reward(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        index, cause = _culprit(reward, prompts, completions, columns, error)
        where = f"for {_named(prompts, index)}"
        if cause is None:
            cause = error
            where = (
                f"for {len(prompts)} prompts together, but for none of them alone; the first is {_named(prompts, 0)}"
            )
        raise RewardError(
            f"the reward raised {type(cause).__name__} {where}: {one_line(cause) or 'no message'}"
        ) from error
    return check_rewards(prompts, rewards)


def _culprit(reward: Reward, prompts: list, completions: list, columns: dict, error: Exception):
    """(index, exception) of the first prompt on which the reward fails alone; (0, None) if there is none."""
    if len(prompts) == 1:
        return 0, error
    for index in range(len(prompts)):
        one = slice(index, index + 1)
        own = {name: column[one] if isinstance(column, list) else column for name, column in columns.items()}
        try:
            reward(prompts=prompts[one], completions=completions[one], **own)
        except Exception as cause:
            return index, cause
    return 0, None


class SequenceReward:
    """The one logit of a Hugging Face sequence-classification model, as a reward.

    A tokenizer with a chat template renders the prompt as the user's turn and the completion as the assistant's, chats
    unchanged; one with a separator token (BERT, DeBERTa) encodes them as a pair; any other as tok(prompt) + tok(completion)
    + EOS, as in training. The last two take texts only. A text that is too long loses the beginning of its prompt first;
    the number of such texts is logged. The characters of a special token in a chat, a pair or a completion are text: a
    completion cannot end its turn and write the next one.

    Args:
        model_or_path: the model, which stays on its device; or a folder or Hub name, loaded in its stored dtype onto
            the accelerator if there is one.
        tokenizer: None to load it from the path.
        batch_size: texts in one forward pass.
        max_length: tokens of a text; None for the model's positions.
        trust_remote_code: run the Python code in the folder.

    Raises:
        RewardError: the model cannot be loaded, does not have exactly one logit, or its head is not in the checkpoint (a
            causal language model would get a random one).
    """

    def __init__(
        self,
        model_or_path,
        tokenizer=None,
        batch_size: int = 16,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if isinstance(model_or_path, (str, os.PathLike)):
            model_or_path, tokenizer = _load(str(model_or_path), tokenizer, trust_remote_code)
        self.model: nn.Module = model_or_path
        self.__name__ = str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
        if tokenizer is None:
            raise RewardError("SequenceReward needs the tokenizer of a model that is given as an object")
        if self.model.config.num_labels != 1:
            raise RewardError(f"a reward model has one logit, {self.__name__} has {self.model.config.num_labels}")
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._chat = ChatEncoder(tokenizer) if tokenizer.chat_template else None
        self.max_length = max_length or min(positions(self.model) or 2**30, tokenizer.model_max_length)
        pads = (tokenizer.pad_token_id, self.model.config.pad_token_id, pad_or_eos(tokenizer))
        self._pad = next((pad for pad in pads if pad is not None), None)
        if self._pad is None:
            raise RewardError(f"the tokenizer of {self.__name__} has neither a padding nor an EOS token")
        self.model.config.pad_token_id = self._pad  # a decoder scores the last token that differs from it
        self.model.eval()

    @functools.cached_property
    def identity(self) -> str:
        """A digest of what decides the rewards: weights, config and dtype."""
        return reference_id(self.model).digest

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str | list], completions: Sequence[str | list], **columns) -> list[float]:
        texts = [self.encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        if self._chat is None and self.tokenizer.sep_token_id is None:
            warn_of_control_texts(self.tokenizer, prompts)
        cut = sum(was_cut for _, was_cut in texts)
        if cut:
            logger.warning("max_length=%d of the reward model cut %d of %d texts", self.max_length, cut, len(texts))
        order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]["input_ids"]))
        device = next(self.model.parameters()).device
        rewards = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = {name: t.to(device) for name, t in self.batch([texts[i][0] for i in chosen]).items()}
            for i, logit in zip(chosen, self.model(**batch).logits[:, 0].float().tolist(), strict=True):
                rewards[i] = logit
        return rewards

    def encode(self, prompt: str | list, completion: str | list) -> tuple[dict[str, list[int]], bool]:
        """Token ids (and token types, for a pair), and whether they were cut."""
        tok, limit = self.tokenizer, self.max_length
        if self._chat:
            ids = self._chat.whole([*_messages("user", prompt), *_messages("assistant", completion)])
            return {"input_ids": ids[-limit:]}, len(ids) > limit
        if not isinstance(prompt, str):
            raise RewardError(f"prompts are chats, and the tokenizer of {self.__name__} has no chat template")
        if tok.sep_token_id is not None:
            whole = tok(prompt, completion, split_special_tokens=True)
            keep = [name for name in ("input_ids", "token_type_ids") if name in whole]
            if cut := len(whole["input_ids"]) > limit:
                side, tok.truncation_side = tok.truncation_side, "left"
                try:
                    whole = tok(
                        prompt, completion, truncation="longest_first", max_length=limit, split_special_tokens=True
                    )
                finally:
                    tok.truncation_side = side
            return {name: list(whole[name]) for name in keep}, cut
        (ids,), (answer,) = open_ids(tok, [prompt]), text_ids(tok, [completion])
        answer = answer if tok.eos_token_id is None else [*answer, tok.eos_token_id]
        kept, (shown,) = fit(ids, [answer], limit, max(1, limit // 2))
        return {"input_ids": [*kept, *shown]}, len(kept) + len(shown) < len(ids) + len(answer)

    def batch(self, texts: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Right-padded: [B, T] int64."""
        rows = [{**text, "attention_mask": [1] * len(text["input_ids"])} for text in texts]
        fills = {"input_ids": self._pad, "token_type_ids": 0, "attention_mask": 0}
        width = max(1, max(len(row["input_ids"]) for row in rows))
        return {
            name: torch.tensor([row[name] + [fills[name]] * (width - len(row[name])) for row in rows])
            for name in rows[0]
        }


def _messages(role: str, said: str | list) -> list:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _load(path: str, tokenizer, trust_remote_code: bool):
    from transformers import AutoModelForSequenceClassification

    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": bool(trust_remote_code)}
    try:
        tokenizer = tokenizer or load_tokenizer(path, trust_remote_code)
        model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # a damaged folder raises anything
        raise RewardError(f"{path}: {one_line(error)}") from None
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise RewardError(f"{path} is not a reward model: its checkpoint has no {missing}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.to(device), tokenizer


def load_reward(spec: str | os.PathLike, trust_remote_code: bool = False) -> Reward:
    """A reward by name: "module:function" (the working directory is searched too), or the folder or Hub name of a
    sequence-classification model.

    Args:
        trust_remote_code: run the Python code in the model's folder.

    Raises:
        RewardError: there is no such folder, module or function, or the model is not a reward model.
    """
    spec = os.fspath(spec)
    if Path(spec).is_dir():
        return SequenceReward(spec, trust_remote_code=trust_remote_code)
    module, colon, name = spec.partition(":")
    if colon and all(part.isidentifier() for part in module.split(".")):
        return _import(module, name)
    if Path(spec).exists() or Path(spec).is_absolute() or spec.startswith(".") or spec.count("/") > 1:
        raise RewardError(f"{spec}: neither the folder of a reward model nor module:function")
    return SequenceReward(spec, trust_remote_code=trust_remote_code)


def _import(module: str, name: str) -> Reward:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise RewardError(f"{module}:{name}: importing {module} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RewardError(f"{module}:{name}: {module} has no callable {name!r}")
    return found
