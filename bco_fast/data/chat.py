"""Chat messages: which part of a conversation is the completion, and its tokens under the tokenizer's chat template.

    tokens = tok(template(messages)),    the prompt being tok(template(messages but the last, add_generation_prompt))

without further special tokens: the template writes them. The prompt's rendering must be the beginning of the whole
rendering. A rendering that does not close with a special token gets EOS behind it, because a completion must end.

What a message says is data. Where its text holds a special token ("</s>"), that text is encoded as text, so nobody ends
a turn or opens a system message from inside one; template syntax ("{{ x }}") is never evaluated.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .sources import FeedbackError, Flaw, shortened

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_REPLIES = ("assistant", "tool", "function", "ipython")

Message = dict
"""{"role": ..., "content": ...}, and what else the template reads: tool_calls, name, reasoning_content, ..."""


def as_messages(value, name: str) -> tuple[Message, ...]:
    """Validated messages; content given as text parts is joined, keys whose value is null are dropped.

    Raises:
        Flaw: value is no list of messages.
    """
    if not value:
        raise Flaw(f"{name} has no message")
    return tuple(_message(message, f"{name}[{index}]") for index, message in enumerate(value))


def _message(value, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise Flaw(f"{where} must be a message with role and content, not {type(value).__name__}")
    if "role" not in value:
        raise Flaw(f"{where} has no 'role' (found: {shortened(value)})")
    role = value["role"]
    if role not in ROLES:
        raise Flaw(f"the role of {where} must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}")
    message = {key: item for key, item in value.items() if item is not None}  # Arrow fills absent keys with null
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        message["content"] = "".join(_text_part(part, where) for part in content)
    elif content is None:
        if not message.get("tool_calls"):
            raise Flaw(f"{where} has no 'content'")
    elif not isinstance(content, str):
        raise Flaw(f"the content of {where} must be a string, not {type(content).__name__}")
    _check_json(message, where)
    return message


def _text_part(part, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise Flaw(f"the content of {where} has a part that is not text ({str(kind)[:40]})")


def conversation(prompt, completion, name: str) -> tuple[tuple[Message, ...], Message]:
    """(prompt, the last assistant message) of a row in which one of the two is messages.

    Args:
        prompt: a string (a user's message), messages, or None when `completion` is the whole conversation. A completion
            may begin with the prompt again, as exported preference data often does.
        completion: a string (the assistant's message) or messages; all but the last count as prompt.
        name: of the completion's column, for complaints.
    """
    if isinstance(completion, str):
        messages = ({"role": "assistant", "content": completion},)
    else:
        messages = as_messages(completion, name)
    if isinstance(prompt, str):
        before = ({"role": "user", "content": prompt},)
        said = any(m["role"] == "user" and m.get("content", "").strip() == prompt.strip() for m in messages)
    else:
        before = () if prompt is None else as_messages(prompt, "prompt")
        said = messages[: len(before)] == before
    if not said:
        if messages[0]["role"] not in _REPLIES:
            raise Flaw(f"{name} begins with a message from {messages[0]['role']!r}, but not with the prompt")
        messages = (*before, *messages)
    *context, last = messages
    if last["role"] != "assistant":
        raise Flaw(f"the last message of {name} is from {last['role']!r}, not 'assistant'")
    if not context:
        raise Flaw(f"{name} has nothing before the assistant's message")
    if not last.get("content", "").strip() and not last.get("tool_calls"):
        raise Flaw(f"{name} is empty")
    return tuple(context), last


def as_tools(value) -> tuple[dict, ...] | None:
    """The functions a model may call, as the template takes them: JSON schemas, or one string of JSON."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Flaw(f"tools is not JSON ({error})") from None
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise Flaw("tools must be a list of JSON schemas")
    _check_json(list(value), "tools")
    return tuple(value) or None


def _check_json(value, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Flaw(f"{where} has a lone surrogate, which is no text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise Flaw(f"{where} is not JSON ({error})") from None


def special_tokens(tokenizer) -> dict[str, int]:
    """{text: id} of every token that controls the model, so that text must not become it."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    added = {str(token): index for index, token in added if token.special}
    return added | dict(zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=True))


@dataclass(frozen=True)
class Rendering:
    """One row as text. A character of `literals` stands for the text of a special token that somebody wrote."""

    prompt: str
    completions: tuple[str, ...]
    literals: dict[str, str]


def with_template(tokenizer, template: str | os.PathLike | None):
    """A copy of the tokenizer with another chat template; the tokenizer itself where `template` is None.

    Args:
        template: the path of a Jinja file, or the template as text.

    Raises:
        FeedbackError: it is neither a readable file nor a template.
    """
    if template is None:
        return tokenizer
    text = str(template)
    if "{" not in text:  # a template without a tag would say the same of every conversation
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FeedbackError(f"chat_template {template}: neither a template nor a file ({reason})") from None
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = text
    return tokenizer


class ChatEncoder:
    """Conversations to tokens, by the tokenizer's chat template.

    Raises:
        FeedbackError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise FeedbackError("rows are chat messages, and the tokenizer has no chat template")
        specials = sorted(special_tokens(tokenizer), key=lambda text: (-len(text), text))
        self.tokenizer = tokenizer
        self.specials = re.compile("|".join(map(re.escape, specials)))
        self.closes = tuple(specials)
        self.left_out: Counter[str] = Counter()
        """Rows whose prompt the template does not write in full: by role, and "tools"."""

    def render(self, prompt: Sequence[Message], completions: Sequence[Message], tools) -> Rendering:
        """
        Raises:
            Flaw: the template refuses the conversation, leaves the completion out, or writes a prompt that is not the
                beginning of the whole.
        """
        literals, (prompt, completions, tools) = self._mark((list(prompt), list(completions), tools))
        before = self._apply(prompt, tools, add_generation_prompt=True)
        self.left_out.update(_left_out(before, prompt, tools))
        parts = []
        for completion in completions:
            whole = self._apply([*prompt, completion], tools)
            if not whole.startswith(before):
                shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
                raise Flaw(
                    "the chat template does not begin the conversation as it begins the prompt alone, which goes on with "
                    f"{before[shared : shared + 40]!r}"
                )
            part = whole[len(before) :]
            if not self.specials.sub("", part).strip():
                raise Flaw("the chat template writes nothing of the last message")
            parts.append(part if part.rstrip().endswith(self.closes) else part + self.tokenizer.eos_token)
        return Rendering(before, tuple(parts), literals)

    def _apply(self, messages: list[Message], tools, **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except Exception as error:  # the template is a program of the model's author; what it raises is about this row
            raise Flaw(f"the chat template refuses it ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None  # fmt: skip

    def _mark(self, value: tuple) -> tuple[dict[str, str], tuple]:
        """Special tokens in the text of messages and tools, each replaced by a character that occurs nowhere else."""
        texts = list(_strings(value))
        found = {match[0] for text in texts for match in self.specials.finditer(text)}
        if not found:
            return {}, value
        taken = set().union(*texts)
        free = (mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if mark not in taken)
        marks = dict(zip(sorted(found), free, strict=False))

        def marked(text: str) -> str:
            return self.specials.sub(lambda match: marks[match[0]], text)

        return {mark: text for text, mark in marks.items()}, _replaced(value, marked)

    def encode(self, renderings: Sequence[Rendering]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """(ids of the prompt, ids of each completion) per rendering.

        The ids are those of the whole text where they begin with the prompt's. Where a token would reach across the
        border, prompt and completion are encoded apart: a model that generates has seen the prompt by itself.
        """
        plain = iter(self._ids([text for r in renderings if not r.literals for text in _texts(r)]))
        for rendering in renderings:
            literals = rendering.literals
            prompt, *wholes = (self._marked_ids(t, literals) if literals else next(plain) for t in _texts(rendering))
            sides = [
                whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._marked_ids(part, literals)
                for whole, part in zip(wholes, rendering.completions, strict=True)
            ]
            yield prompt, sides

    def _ids(self, texts: list[str], **options) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, **options)["input_ids"]

    def _marked_ids(self, text: str, literals: dict[str, str]) -> list[int]:
        pieces = re.split(f"([{''.join(literals)}])", text) if literals else [text]
        ids = []
        for piece in filter(None, pieces):
            as_text = piece in literals
            ids += self._ids([literals.get(piece, piece)], split_special_tokens=as_text)[0]
        return ids


def _tool_name(tool: Mapping) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def _left_out(text: str, prompt: Sequence[Message], tools) -> set[str]:
    """What a template did not write. Replies are not looked at: templates drop the thoughts of former turns by intent."""
    lost = {
        message["role"]
        for message in prompt
        if message["role"] not in _REPLIES and message.get("content", "").strip() not in text
    }
    names = [_tool_name(tool) for tool in tools or ()]
    return lost | {"tools" for name in names if name not in text}


def _texts(rendering: Rendering) -> list[str]:
    return [rendering.prompt, *(rendering.prompt + part for part in rendering.completions)]


def _strings(value) -> Iterator[str]:
    """All text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value, *value.values()):
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _replaced(value, change: Callable[[str], str]):
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: _replaced(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, change) for item in value)
    return value
