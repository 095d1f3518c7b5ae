"""Chat messages: which part of a conversation is the completion, and its tokens under the tokenizer's chat template.

    tokens = tok(template(messages)),    prompt = tok(template(all messages but the last, add_generation_prompt))

No further special tokens are added: the template writes them. The conversation's rendering must begin with the prompt's.
A rendering that does not end with a special token gets EOS appended, because a completion must end.

The text of a message is data. If it holds a special token ("</s>"), that is encoded as plain text, so a message cannot end
its turn or open a system message; template syntax ("{{ x }}") is never evaluated.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateSyntaxError

from .sources import FeedbackError, RowError, one_line, shortened
from .tokenizer import special_tokens, text_ids

logger = logging.getLogger("bco_fast")

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_REPLIES = ("assistant", "tool", "function", "ipython")

Message = dict
"""{"role": ..., "content": ...}, and whatever else the template reads: tool_calls, name, reasoning_content, ..."""


def as_messages(value, name: str) -> tuple[Message, ...]:
    """Validated messages; content given as text parts is joined, keys whose value is null are dropped.

    Raises:
        RowError: value is not a list of messages.
    """
    if not value:
        raise RowError(f"{name} has no message")
    return tuple(_message(message, f"{name}[{index}]") for index, message in enumerate(value))


def _message(value, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(f"{where} must be a message with role and content, not {type(value).__name__}")
    if "role" not in value:
        raise RowError(f"{where} has no 'role' (found: {shortened(value)})")
    role = value["role"]
    if role not in ROLES:
        raise RowError(f"the role of {where} must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}")
    message = {key: item for key, item in value.items() if item is not None}  # Arrow fills absent keys with null
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        message["content"] = "".join(_text_part(part, where) for part in content)
    elif content is None:
        if not message.get("tool_calls"):
            raise RowError(f"{where} has no 'content'")
    elif not isinstance(content, str):
        raise RowError(f"the content of {where} must be a string, not {type(content).__name__}")
    _check_json(message, where)
    return message


def _text_part(part, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RowError(f"the content of {where} has a part that is not text ({str(kind)[:40]})")


def conversation(prompt, completion, name: str) -> tuple[tuple[Message, ...], Message]:
    """(prompt, the last assistant message) of a row in which one of the two is messages.

    Args:
        prompt: a string (a user's message), messages, or None when `completion` is the whole conversation. A completion
            may repeat the prompt at its beginning, as exported preference data often does.
        completion: a string (the assistant's message) or messages; all but the last count as prompt.
        name: the completion's column, for errors.
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
            raise RowError(f"{name} begins with a message from {messages[0]['role']!r}, but not with the prompt")
        messages = (*before, *messages)
    *context, last = messages
    if last["role"] != "assistant":
        raise RowError(f"the last message of {name} is from {last['role']!r}, not 'assistant'")
    if not context:
        raise RowError(f"{name} has nothing before the assistant's message")
    if not last.get("content", "").strip() and not last.get("tool_calls"):
        raise RowError(f"{name} is empty")
    return tuple(context), last


def sides_of(conversations: Sequence[tuple[tuple[Message, ...], Message]]) -> tuple[tuple[Message, ...], tuple]:
    """(prompt, completions) of the conversations of one row: the last messages, where all before them is the same.

    Where the two sides of a pair part earlier, and nobody but the assistant and its tools speaks from there on, their
    completions begin there: with what it called, what came back, and what it made of that.

    Raises:
        RowError: somebody else speaks.
    """
    prompt = conversations[0][0]
    if all(context == prompt for context, _ in conversations):
        return prompt, tuple(last for _, last in conversations)
    wholes = [(*context, last) for context, last in conversations]
    shared = next(i for i, turn in enumerate(zip(*wholes, strict=False)) if any(m != turn[0] for m in turn))
    rests = [whole[shared:] for whole in wholes]
    if shared == 0 or any(r[0]["role"] != "assistant" or {m["role"] for m in r} - {*_REPLIES} for r in rests):
        raise RowError("chosen and rejected differ before their last message, in more than calls of tools")
    return wholes[0][:shared], tuple(rests)


def as_tools(value) -> tuple[dict, ...] | None:
    """The functions a model may call, as the template takes them: JSON schemas, or one string of JSON."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"tools is not JSON ({error})") from None
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("tools must be a list of JSON schemas")
    _check_json(list(value), "tools")
    return tuple(value) or None


OURS = (
    "conversation",
    "messages",
    "tools",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
)
"""Arguments of `apply_chat_template` that a row may not set."""


def as_variables(value) -> dict | None:
    """Variables for the template, such as `enable_thinking`: a JSON object, or a string of it. None in it means: not given."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"chat_template_kwargs is not JSON ({error})") from None
    if not value:
        return None
    if not isinstance(value, Mapping):
        raise RowError("chat_template_kwargs must be an object of the template's variables")
    for name in OURS:
        if name in value:
            raise RowError(f"chat_template_kwargs sets {name}, which is not the row's to choose")
    _check_json(value, "chat_template_kwargs")
    return {name: setting for name, setting in value.items() if setting is not None} or None


def _check_json(value, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(f"{where} has a lone surrogate, which is not text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{where} is not JSON ({error})") from None


@dataclass(frozen=True)
class Rendering:
    """One row as text. Each character in `literals` replaces a special token that was written as text."""

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
    if "{" not in text:  # a template without a tag would render every conversation alike
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FeedbackError(f"chat_template {template}: neither a template nor a file ({reason})") from None
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise FeedbackError(f"chat_template: not a Jinja template ({error}, line {error.lineno})") from None
    except Exception as error:  # it compiles; whether it takes a conversation is asked of each row
        logger.debug("chat_template refuses an empty message: %s", error)
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
        self.specials = re.compile("|".join(map(re.escape, specials)) or "(?!)")
        self.closes = tuple(specials)
        self.left_out: Counter[str] = Counter()
        """Rows whose prompt the template does not render in full: by role, and "tools"."""

    def render(
        self,
        prompt: Sequence[Message],
        completions: Sequence[Message | tuple[Message, ...]],
        tools,
        variables: Mapping | None = None,
    ) -> Rendering:
        """
        Args:
            completions: each one message, or all that follow the prompt.
            variables: for the template (`as_variables`).

        Raises:
            RowError: the template refuses the conversation, leaves out the completion, or renders the prompt differently
                inside the conversation.
        """
        literals, (prompt, completions, tools) = self._mark((list(prompt), list(completions), tools))
        given = variables or {}
        before = self._apply(prompt, tools, add_generation_prompt=True, **given)
        self.left_out.update(_left_out(before, prompt, tools))
        parts = []
        for completion in completions:
            turns = [completion] if isinstance(completion, Mapping) else completion
            whole = self._apply([*prompt, *turns], tools, **given)
            if not whole.startswith(before):
                shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
                raise RowError(
                    "the chat template renders the prompt differently inside the conversation than alone, where it continues "
                    f"with {before[shared : shared + 40]!r}"
                )
            part = whole[len(before) :]
            if not self.specials.sub("", part).strip():
                raise RowError("the chat template leaves out the last message")
            parts.append(part if part.rstrip().endswith(self.closes) else part + self.tokenizer.eos_token)
        return Rendering(before, tuple(parts), literals)

    def whole(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a whole conversation, as a reward model reads it. Raises `RowError` if the template refuses it."""
        literals, (messages,) = self._mark((list(messages),))
        return self._marked_ids(self._apply(messages, None), literals)

    def _apply(self, messages: list[Message], tools, **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except Exception as error:  # a template is a program, which may raise anything about a row
            raise RowError(f"the chat template refuses it ({type(error).__name__}: {one_line(error)[:300]})") from None

    def _mark(self, value: tuple) -> tuple[dict[str, str], tuple]:
        """Replace each special token in the text of messages and tools by a character that occurs nowhere else."""
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

    def warn(self) -> None:
        """Log what the template leaves out of the rows rendered so far."""
        if self.left_out:
            lost = ", ".join(f"{what} in {count} rows" for what, count in sorted(self.left_out.items()))
            logger.warning("the chat template leaves out or changes %s", lost)

    def encode(self, renderings: Sequence[Rendering]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """(ids of the prompt, ids of each completion) per rendering.

        These are the ids of the whole text if they begin with the prompt's. If a token would reach across the border,
        prompt and completion are encoded separately: a model that generates sees the prompt alone.
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

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _marked_ids(self, text: str, literals: dict[str, str]) -> list[int]:
        pieces = re.split(f"([{''.join(literals)}])", text) if literals else [text]
        ids = []
        for piece in filter(None, pieces):
            ids += (text_ids(self.tokenizer, [literals[piece]]) if piece in literals else self._ids([piece]))[0]
        return ids


def _left_out(text: str, prompt: Sequence[Message], tools) -> set[str]:
    """What a template left out. Replies are not checked: templates drop the reasoning of earlier turns on purpose."""
    lost = {
        message["role"]
        for message in prompt
        if message["role"] not in _REPLIES and message.get("content", "").strip() not in text
    }
    functions = [tool.get("function", tool) for tool in tools or ()]
    return lost | {"tools" for f in functions if isinstance(f, Mapping) and str(f.get("name", "")) not in text}


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
