"""A language model behind an OpenAI-compatible endpoint as a pairwise judge, as in BCO's Fig. 1 and 2 (arXiv 2404.04656, App. C).

httpx comes with transformers. Every pair is judged twice, with the two answers in either order; each order counts half, so a judge that prefers a position gives
a tie. Verdicts are appended to a file as they come. A run that was stopped asks again only for what is not in that file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

logger = logging.getLogger("bco_fast")

INSTRUCTIONS = (
    "You compare two answers of AI assistants to a user's question and decide which one serves the user better. Consider whether "
    "an answer follows the instructions, and whether it is helpful, relevant, correct, deep, creative and detailed. Neither the "
    "order nor the length of the answers nor the assistants' names may influence you. Explain your decision in a few sentences. "
    "Then end with one of these: [[A]] if A is better, [[B]] if B is better, [[C]] if neither is."
)
"""Our wording of what BCO's Fig. 5 asks (it borrows FastChat's prompt), with the same three verdicts."""
QUESTION = (
    "[User's question]\n{question}\n\n[Answer of A]\n{answer_a}\n[End of A]\n\n[Answer of B]\n{answer_b}\n[End of B]"
)
_FIELDS = ("question", "answer_a", "answer_b")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_POINTS = {"A": 1.0, "B": 0.0, "C": 0.5}
_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
"""Statuses after which the same request may succeed."""


class EndpointError(ValueError):
    """The endpoint refuses, does not answer, or answers something else; what was judged before is kept."""


@dataclass
class ChatEndpoint:
    """`POST url/chat/completions`, with retries.

    Args:
        url: as in https://api.openai.com/v1.
        model: its name there.
        key_variable: environment variable that holds the key; the key is sent and nothing else. No key is sent if the
            variable is not set, as local servers need none.
        timeout: seconds to wait for one answer.
        retries: further tries after a failure that may pass: no connection, no answer in time, status 429 or 5xx.
        pause: seconds before the first of them, doubled each time, at most 60; a Retry-After header wins.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 5
    pause: float = 1.0
    max_tokens: int = 1024

    def __post_init__(self):
        import httpx

        if not re.match(r"https?://", self.url):
            raise EndpointError(f"the endpoint must begin with http:// or https://, not {self.url!r}")
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=self.timeout, limits=httpx.Limits(max_connections=None))

    def close(self) -> None:
        self._client.close()

    def answer(self, messages: Sequence[dict]) -> str:
        """The text that the model writes, greedily. Raises `EndpointError`."""
        import httpx

        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        address, wait = self.url.rstrip("/") + "/chat/completions", self.pause
        for tries_left in range(self.retries, -1, -1):
            after = None
            try:
                response = self._client.post(address, json=body)
                if response.status_code == 200:
                    return self._text(response)
                problem, after = (
                    f"status {response.status_code}: {response.text[:200]}",
                    response.headers.get("retry-after"),
                )
                again = response.status_code in _AGAIN
            except httpx.TimeoutException:
                problem, again = f"no answer within {self.timeout:g} s", True
            except httpx.HTTPError as error:
                problem, again = f"{type(error).__name__}: {error}", True
            if not again or not tries_left:
                raise EndpointError(f"{address}: {' '.join(problem.split())}")
            time.sleep(min(float(after) if after and after.isdigit() else wait, 60.0))
            wait *= 2
        raise AssertionError("unreachable")

    def _text(self, response) -> str:
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise EndpointError(f"{self.url}: not a chat completion: {response.text[:200]!r}")
        return text


class Verdicts:
    """Verdicts on disk, one line of JSON each, appended as they come; a line cut off by a kill is not read."""

    def __init__(self, path: str | os.PathLike):
        self.path, self._lock = Path(path), threading.Lock()
        self.known: dict[str, str] = {}
        whole = 0
        if self.path.is_file():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            for number, line in enumerate(data[:whole].splitlines(), 1):
                try:
                    record = json.loads(line)
                    self.known[record["key"]] = record["answer"]
                except (ValueError, LookupError, TypeError):
                    raise EndpointError(f"{self.path}:{number}: not a verdict; give another file") from None
            if whole < len(data):
                os.truncate(self.path, whole)

    def add(self, key: str, answer: str) -> None:
        line = json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n"
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self.known[key] = answer


@dataclass
class PairwiseJudge:
    """Compares answers by a chat model.

    Args:
        prompt: the user's message, with {question}, {answer_a} and {answer_b}; the fields are replaced, nothing else is read.
        workers: requests under way at a time.
    """

    endpoint: ChatEndpoint
    verdicts: Verdicts
    instructions: str = INSTRUCTIONS
    prompt: str = QUESTION
    workers: int = 8
    asked: int = field(default=0, init=False)
    unclear: int = field(default=0, init=False)
    """Answers without a verdict, counted as ties."""

    def __post_init__(self):
        missing = [name for name in _FIELDS if f"{{{name}}}" not in self.prompt]
        if missing:
            raise EndpointError(f"the judge's prompt lacks {{{missing[0]}}}")
        if self.workers < 1:
            raise EndpointError(f"workers must be at least 1, not {self.workers}")

    def wins(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> np.ndarray:  # [pairs]
        """1 where A is better in both orders, 0 where B is, 1/2 or 1/4 or 3/4 where the orders disagree or tie.

        Raises:
            EndpointError: of the first request that fails for good; verdicts that have come are kept.
        """
        orders = [(p, x, y) for p, x, y in zip(prompts, a, b, strict=True)] + list(zip(prompts, b, a, strict=True))
        messages = [self._messages(*order) for order in orders]
        keys = [self._key(said) for said in messages]
        waiting = {key: said for key, said in zip(keys, messages, strict=True) if key not in self.verdicts.known}
        if len(waiting) < len(set(keys)):
            logger.info(
                "%d of %d verdicts are in %s", len(set(keys)) - len(waiting), len(set(keys)), self.verdicts.path
            )
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for _ in pool.map(
                    lambda item: self.verdicts.add(item[0], self.endpoint.answer(item[1])), waiting.items()
                ):
                    self.asked += 1
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        points = np.array([self._points(self.verdicts.known[key]) for key in keys])
        forward, backward = points[: len(prompts)], points[len(prompts) :]
        return (forward + 1 - backward) / 2

    def _messages(self, question: str, answer_a: str, answer_b: str) -> list[dict]:
        values = dict(zip(_FIELDS, (question, answer_a, answer_b), strict=True))
        text = re.sub(r"\{(question|answer_a|answer_b)\}", lambda found: values[found[1]], self.prompt)
        return [{"role": "system", "content": self.instructions}, {"role": "user", "content": text}]

    def _key(self, messages: Sequence[dict]) -> str:
        said = json.dumps([self.endpoint.model, self.endpoint.max_tokens, messages], sort_keys=True)
        return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _points(self, answer: str) -> float:
        found = _VERDICT.findall(answer)
        if not found:
            self.unclear += 1
            return 0.5
        return _POINTS[found[-1]]
