"""Asks a model behind an OpenAI-compatible endpoint: concurrent calls with retries, and a cache of their answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tdpo.config.checks import check_values, documented
from tdpo.errors import UserError
from tdpo.files import atomic_write, check_writable
from tdpo.types import Message

logger = logging.getLogger("tdpo")

KEY_VARIABLE = "OPENAI_API_KEY"
NO_KEY = "none"
"""Sent as the key where there is none: the client insists on one, local endpoints ignore it."""
SHORTEST_SECRET = 4
"""Characters of a key from which on it is hidden in answers: placeholders such as x are no secret, and in any text."""
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before the first retry, doubled by each further one; a random half of it is left out."""
LONGEST_WAIT = 600.0
"""Seconds that an endpoint may ask to wait before the call fails instead."""
FAILURES_IN_A_ROW = 8
"""Calls that fail one after another, each after all its retries, before the rest is given up."""
NO_CHOICES = "no choices"


@documented
@dataclass
class EndpointOptions:
    """The judge's endpoint; needs the extra ``judge``, and the environment variable OPENAI_API_KEY if it wants a key.

    Attributes:
        endpoint: Base URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.
        judge_model: Name of the model there.
        temperature: Temperature of the judge; none sends no temperature.
        max_tokens: Longest answer in tokens; an answer cut at this length is unparsed. none sends no limit.
        seed: Seed sent with each call; none sends no seed.
        extra_body: JSON object of further fields of each request, such as '{"max_completion_tokens": 4096}'.
        timeout: Seconds without data from the endpoint after which an attempt fails.
        max_retries: Further attempts of a call after status 408, 409, 429 or 5xx, a timeout or a lost connection.
        requests_per_minute: Most requests sent in a minute, evenly spaced, retries included.
        concurrency: Calls at a time.
        cache_dir: Folder of the answers. Default: .tdpo-judge beside the file of --json, or in the working folder.
        price_per_million_input: Price of a million prompt tokens, to report the cost.
        price_per_million_output: Price of a million tokens of answers.
    """

    endpoint: str | None = None
    judge_model: str | None = None
    temperature: float | None = 0.0
    max_tokens: int | None = 2048
    seed: int | None = 0
    extra_body: dict[str, Any] | None = None
    timeout: float = 60.0
    max_retries: int = 5
    requests_per_minute: float | None = None
    concurrency: int = 4
    cache_dir: str | None = None
    price_per_million_input: float | None = None
    price_per_million_output: float | None = None

    def __post_init__(self) -> None:
        check_values(
            self, temperature=0, max_tokens=1, max_retries=0, concurrency=1, price_per_million_input=0,
            price_per_million_output=0,
        )  # fmt: skip
        for name in ("timeout", "requests_per_minute"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"--{name} must be above 0, got {value}")
        if self.endpoint is None:
            return
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint {self.endpoint}: expected a URL such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"--endpoint must not hold a user, a password or a query, since it is shown and stored; the key "
                f"is read from {KEY_VARIABLE}"
            )
        if not self.judge_model:
            raise UserError("--judge_model is missing: the name of the model behind --endpoint")
        if (self.price_per_million_input is None) != (self.price_per_million_output is None):
            raise UserError("give both --price_per_million_input and --price_per_million_output, or neither")


@dataclass(frozen=True)
class Completion:
    """An answer of the endpoint.

    Attributes:
        text: Its text; empty if there was none.
        finish_reason: ``stop``, ``length`` or another reason that the endpoint reports.
        model: The model's name as the endpoint reports it.
        prompt_tokens: Tokens of the question; None if the endpoint does not report them.
        completion_tokens: Tokens of the answer.
    """

    text: str
    finish_reason: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass
class Usage:
    """Counts of what was asked.

    Attributes:
        calls: Answers that the endpoint gave in this run.
        cached: Answers that needed no call.
        retries: Attempts beyond the first of each call.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0


class CallFailed(Exception):
    """A call failed for good; the message says why."""


class RetryableFailure(CallFailed):
    """An attempt failed in a way that another may not; ``wait`` is the time the endpoint asks for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Interrupted(Exception):
    """The run is ending while a call waits."""


class AnswerCache:
    """Keeps answers in a folder, one file each, complete or absent.

    Args:
        folder: The folder, which is made.

    Raises:
        UserError: if it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        check_writable(folder)
        self.folder = folder

    def get(self, key: str) -> Completion | None:
        """Returns the answer kept under a key, or None; a damaged file is reported and counts as absent.

        Raises:
            UserError: if it cannot be read.
        """
        path = self.folder / f"{key}.json"
        try:
            return Completion(**json.loads(path.read_text(encoding="utf-8"))["answer"])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("%s is damaged and will be asked again: %s", path, error)
            return None

    def put(self, key: str, request: Mapping[str, Any], answer: Completion) -> None:
        """Keeps an answer with its request.

        Raises:
            UserError: if it cannot be written.
        """
        content = {"request": request, "answer": dataclasses.asdict(answer)}
        try:
            atomic_write(self.folder / f"{key}.json", json.dumps(content, ensure_ascii=False, indent=1))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror or error}") from error


class Pacer:
    """Spaces requests evenly, and all of them after a time that the endpoint asked for.

    Args:
        per_minute: Most requests in a minute; None for no limit.
        stop: Ends every wait when it is set.
    """

    def __init__(self, per_minute: float | None, stop: threading.Event) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._stop = stop
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Waits for this request's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        self.sleep(turn - now)

    def postpone(self, seconds: float) -> None:
        """Lets no request start for a time."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Sleeps, unless the run ends.

        Raises:
            Interrupted: if it does.
        """
        if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
            raise Interrupted


class JudgeClient:
    """Asks an endpoint many questions.

    The key is read from the environment; it is sent to the endpoint and is in no message, log or file.

    Args:
        options: The endpoint and how it is asked.
        cache: Keeps the answers.

    Raises:
        UserError: if the client library is missing or the key cannot be a key.
    """

    def __init__(self, options: EndpointOptions, cache: AnswerCache) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("--endpoint needs the openai client: pip install 'tdpo[judge]'") from error
        self.options, self.cache, self.usage = options, cache, Usage()
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not self._key.isascii() or any(not "!" <= letter <= "~" for letter in self._key):
            raise UserError(f"{KEY_VARIABLE} holds characters that no key has, such as a space")
        # Retries are made here: those of the client sleep where Ctrl-C cannot end them, and are not counted or paced.
        self._client = openai.OpenAI(
            base_url=options.endpoint, api_key=self._key or NO_KEY, timeout=options.timeout, max_retries=0
        )
        self._openai = openai
        self._stop = threading.Event()
        self._pacer = Pacer(options.requests_per_minute, self._stop)
        self._lock = threading.Lock()

    def request(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Returns all that decides an answer: endpoint, model, messages and decoding parameters."""
        sampling = {name: getattr(self.options, name) for name in ("temperature", "max_tokens", "seed")}
        return {
            "endpoint": str(self.options.endpoint).rstrip("/"),
            "model": self.options.judge_model,
            "messages": list(messages),
            **{name: value for name, value in sampling.items() if value is not None},
            "extra_body": self.options.extra_body or {},
        }

    def ask(
        self, questions: Mapping[str, Sequence[Message]], on_answer: Callable[[int], None] = lambda count: None
    ) -> list[Completion]:
        """Returns the answer to each question, from the cache where it is there.

        Equal questions are asked once. An answer is kept as soon as it arrives, so a run that ends early, for any
        reason, continues where it was.

        Args:
            questions: Messages by a label for error messages.
            on_answer: Called with the number of answers so far.

        Raises:
            UserError: if calls fail for good, after all others are done or a few have failed in a row.
        """
        requests = {label: self.request(messages) for label, messages in questions.items()}
        keys = {label: request_key(request) for label, request in requests.items()}
        labels: dict[str, str] = {}  # by key; equal questions have one key
        for label, key in keys.items():
            labels.setdefault(key, label)
        answers = {key: found for key in labels if (found := self.cache.get(key)) is not None}
        missing = {key: requests[label] for key, label in labels.items() if key not in answers}
        self.usage.cached += len(questions) - len(missing)
        on_answer(len(answers))
        failures: dict[str, str] = {}
        in_a_row = 0
        with self._calls(missing) as calls:
            for call in as_completed(calls):
                try:
                    answers[calls[call]] = call.result()
                    in_a_row = 0
                except CallFailed as failure:
                    failures[labels[calls[call]]] = str(failure)
                    in_a_row += 1
                except Interrupted:  # by a call whose error is yet to come here
                    continue
                on_answer(len(answers))
                if in_a_row == FAILURES_IN_A_ROW:
                    break
        if failures:
            raise UserError(self._failed(failures, len(answers), len(labels)))
        return [answers[key] for key in keys.values()]

    @contextmanager
    def _calls(self, missing: Mapping[str, dict[str, Any]]) -> Iterator[dict[Future[Completion], str]]:
        """Starts the calls; at the end, also that by an error, ends their waits and keeps answers on their way."""
        pool = ThreadPoolExecutor(self.options.concurrency, thread_name_prefix="judge")
        try:
            yield {pool.submit(self._call_or_stop, key, request): key for key, request in missing.items()}
        finally:
            self._stop.set()  # calls that have not begun end in the pacer
            pool.shutdown()
            self._stop.clear()

    def _call_or_stop(self, key: str, request: Mapping[str, Any]) -> Completion:
        """Makes a call, in a thread; an error that every other call would meet ends them before they begin."""
        try:
            return self._call(key, request)
        except UserError:
            self._stop.set()
            raise

    def _call(self, key: str, request: Mapping[str, Any]) -> Completion:
        """Makes a call with its retries, and keeps the answer.

        Raises:
            CallFailed: after the last attempt.
            UserError: if no other call can succeed either.
        """
        for attempt in range(self.options.max_retries + 1):
            if attempt:
                with self._lock:
                    self.usage.retries += 1
            self._pacer.wait()
            try:
                answer = self._attempt(request)
                break
            except RetryableFailure as failure:
                if attempt == self.options.max_retries:
                    raise
                if failure.wait is not None and failure.wait > LONGEST_WAIT:
                    raise CallFailed(f"{failure}; it asks to wait {failure.wait:g} seconds") from None
                if failure.wait is not None:
                    self._pacer.postpone(failure.wait)
                else:
                    self._pacer.sleep(min(LONGEST_DELAY, FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1))
        with self._lock:
            self.usage.calls += 1
        if answer.finish_reason != NO_CHOICES:
            self.cache.put(key, request, answer)
        return answer

    def _attempt(self, request: Mapping[str, Any]) -> Completion:
        """Sends a request once."""
        fields = {name: value for name, value in request.items() if name != "endpoint"}
        try:
            return self._read(self._client.chat.completions.create(**fields))
        except self._openai.APIStatusError as error:
            failure = self._status_failure(error.status_code, str(error), error.response.headers)
        except self._openai.APITimeoutError:
            failure = RetryableFailure(f"no answer within --timeout {self.options.timeout:g} seconds")
        except self._openai.APIConnectionError as error:
            failure = RetryableFailure(self._without_key(f"{error} {error.__cause__ or ''}".strip()))
        except ValueError as error:  # of the JSON parser
            failure = RetryableFailure(self._without_key(f"the answer is not valid JSON: {error}"))
        raise failure  # outside of the handlers: the client's exceptions hold the request and with it the key

    def _status_failure(self, status: int, text: str, headers: Mapping[str, str]) -> Exception:
        """Returns the exception for a status that is not 2xx."""
        said = " ".join(self._without_key(text).removeprefix(f"Error code: {status} - ").split())
        message = f"status {status}: {said[:300]}"
        if status in (408, 409, 429) or status >= 500:
            return RetryableFailure(message, retry_after(headers.get("retry-after")))
        where = f"{self.options.endpoint}: {message}"
        if status in (401, 403):
            advice = "does not accept the key in" if self._key else "wants a key: set"
            return UserError(f"{where}. The endpoint {advice} {KEY_VARIABLE}")
        if status == 404:
            model = self.options.judge_model
            return UserError(
                f"{where}. Most base URLs end in /v1; or the endpoint has no model {model!r} (--judge_model)"
            )
        return CallFailed(message)

    def _read(self, found: Any) -> Completion:
        """Reads the client's object, which it does not check.

        Raises:
            RetryableFailure: if it is not a chat completion.
        """
        choices = getattr(found, "choices", None)
        if not isinstance(choices, list):
            shown = self._without_key(str(getattr(found, "error", None) or found))[:200]
            raise RetryableFailure(f"the answer is not a chat completion: {shown!r}")
        message = getattr(choices[0], "message", None) if choices else None
        reason = getattr(choices[0], "finish_reason", None) if choices else NO_CHOICES
        usage, model = getattr(found, "usage", None), getattr(found, "model", None)
        counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        prompt_tokens, completion_tokens = (count if isinstance(count, int) else None for count in counts)
        return Completion(
            text=self._without_key(str(getattr(message, "content", None) or "")),
            finish_reason=self._without_key(str(reason)) if reason else None,
            model=self._without_key(str(model)) if model else None,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )

    def _without_key(self, text: str) -> str:
        """Hides the key in what an endpoint answers, and replaces lone surrogates, which cannot be written."""
        text = text.encode(errors="replace").decode()
        return text.replace(self._key, "***") if len(self._key) >= SHORTEST_SECRET else text

    def _failed(self, failures: Mapping[str, str], done: int, total: int) -> str:
        """Describes calls that failed for good."""
        label, reason = list(failures.items())[-1]
        last = f"The last error ({label}): {reason}"
        if not done:
            given_up = f", the first {len(failures)} tried" if len(failures) < total else ""
            return f"{self.options.endpoint}: all calls failed{given_up}. {last}"
        named = ", ".join(list(failures)[:5]) + (", ..." if len(failures) > 5 else "")
        return (
            f"{self.options.endpoint}: {len(failures)} calls failed ({named}). {last}. {done} of {total} answers are "
            f"in {self.cache.folder}; the same command makes only the missing calls"
        )


def request_key(request: Mapping[str, Any]) -> str:
    """Returns a hash of a request, the name of its answer in the cache.

    Examples:
        >>> request_key({"model": "m", "seed": 0}) == request_key({"seed": 0, "model": "m"})
        True
    """
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def retry_after(value: str | None) -> float | None:
    """Reads the header ``Retry-After``: seconds or a date; None if there is none that can be read.

    Examples:
        >>> retry_after("1.5"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), retry_after("soon")
        (1.5, 0.0, None)
    """
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
