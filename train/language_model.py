"""Modification texts written by a language model: any OpenAI-compatible endpoint, or a chat model of `transformers`.

Answers are kept as they come, one JSON line each, so that a run that was stopped goes on where it was and pays nothing
twice. Attempts are bounded, over all runs; what stays unusable is counted by reason, never replaced.
"""

import hashlib
import http.client
import itertools
import json
import math
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO


PROMPT = """Two pictures are described by these captions.
First: {reference}
Second: {target}
Somebody looks at the first picture and wants the second. Write what they would ask for: one short sentence that says \
what to change, without describing what stays the same, and without the words "picture", "image" or "caption".
Answer with JSON alone: {{"modification": "..."}}"""
MAX_WORDS = 40
TOKENS = ("prompt_tokens", "completion_tokens")
HOPELESS = 32  # pairs in a row without a usable answer, after which a model is left alone
FROM_CACHE, GIVEN_UP = Counter({"from cache": 1}), Counter({"given up": 1, "not asked again": 1})


class UnusableAnswer(ValueError):
    """The model answered, but not with a modification."""


class EndpointError(RuntimeError):
    """The endpoint gave no answer. `.wait` is how many seconds it asks to be left alone, `.reason` what it says of it,
    `.refused` the field of the request that it does not know, where it says so."""

    def __init__(
        self, message: str, wait: float | None = None, permanent: bool = False, reason: str = "", refused: str = ""
    ):
        super().__init__(message)
        self.wait, self.permanent, self.reason, self.refused = wait, permanent, reason, refused


def parse_modification(answer: str) -> str:
    """The modification in a model's answer: a JSON object, possibly fenced or with words around it.

    Of several the last one, as a model that thinks first repeats what it was asked for, "..." included.

    Raises:
        UnusableAnswer: saying what is wrong: no JSON, no text, or one of more than forty words.
    """
    found = []
    for brace in re.finditer(r"\{", answer):
        try:
            content, _ = json.JSONDecoder().raw_decode(answer, brace.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("modification"), str):
            found.append(" ".join(content["modification"].split()))
    if not found:
        raise UnusableAnswer("no JSON with a modification")
    texts = [text for text in found if any(map(str.isalnum, text))]
    if not texts:
        raise UnusableAnswer("empty")
    text = texts[-1]
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character
        raise UnusableAnswer("no text") from error
    if len(text.split()) > MAX_WORDS:
        raise UnusableAnswer(f"more than {MAX_WORDS} words")
    return text


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed, it would take the key to wherever it leads, and leave the prompt behind."""

    def redirect_request(self, *given):
        return None


def refused_field(said: str) -> str:
    """The request's field that an error in OpenAI's form names, or nothing."""
    try:
        field = json.loads(said)["error"]["param"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return field if isinstance(field, str) else ""


class Endpoint:
    """An OpenAI-compatible chat endpoint.

    One that refuses `temperature` or `max_tokens`, as OpenAI's models that think first do, is asked without the first,
    and for the second by its new name, `max_completion_tokens`.

    Args:
        url: up to `/v1`; `/chat/completions` is added.
        model: its name there.
        api_key: sent as a bearer token, without blanks or a line's end around it.
        timeout: seconds for an answer.
        max_tokens: of an answer, what a model thinks before it included.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        timeout: float = 60.0,
        temperature: float = 0.7,
        max_tokens: int = 120,
    ):
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.api_key = api_key and api_key.strip()
        self.timeout, self.max_tokens = timeout, max_tokens
        self.options = {"temperature": temperature, "max_tokens": max_tokens}
        self.opener = urllib.request.build_opener(NoRedirect)

    def __call__(self, prompt: str) -> tuple[str, dict]:
        """The answer's text, and the tokens it took, with its `finish_reason`. Raises `EndpointError`."""
        options, first = self.options, None
        while True:
            try:
                answer = self._ask(prompt, options)
            except EndpointError as error:
                first = first or error
                if error.refused not in ("temperature", "max_tokens") or error.refused not in options:
                    raise (first if error.permanent else error) from None
                options = {name: value for name, value in options.items() if name != error.refused}
                if error.refused == "max_tokens":
                    options["max_completion_tokens"] = self.max_tokens
            else:
                self.options = options  # for the next, too, as they were taken
                return answer

    def _ask(self, prompt: str, options: dict) -> tuple[str, dict]:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **options}
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                received = response.read()
        except urllib.error.HTTPError as error:
            wait = error.headers.get("Retry-After", "")
            wait = float(wait) if re.fullmatch(r"\d+(\.\d+)?", wait) else None
            permanent = error.code not in (408, 409, 429) and error.code < 500
            try:
                said = error.read(10_000).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                said = ""
            reason = " ".join(said.split())[:300]
            if error.code < 400:
                reason = f"it has moved to {error.headers.get('Location')}"
            raise EndpointError(f"HTTP {error.code}", wait, permanent, reason, refused_field(said)) from error
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"no connection or timeout ({str(error) or type(error).__name__})") from error
        except ValueError as error:  # whose text may hold the key
            raise EndpointError("an API key or an address that cannot be sent", permanent=True) from error
        try:
            content = json.loads(received)
            choice, usage = content["choices"][0], content.get("usage")
            answer = choice["message"]["content"] or ""
            if not isinstance(answer, str):
                raise TypeError(f"content is {answer!r}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EndpointError("an answer that is no chat completion") from error
        return answer, {"finish_reason": choice.get("finish_reason")} | (usage if isinstance(usage, dict) else {})


class ChatModel:
    """A chat model of `transformers`, run here. Raises what loading it raises."""

    def __init__(self, name: str, temperature: float = 0.7, max_tokens: int = 120, device: str | None = None):
        from transformers import pipeline

        self.model, self.temperature, self.max_tokens = name, temperature, max_tokens
        self.generate = pipeline("text-generation", model=name, device=device)

    def __call__(self, prompt: str) -> tuple[str, dict]:
        messages = [{"role": "user", "content": prompt}]
        output = self.generate(messages, max_new_tokens=self.max_tokens, do_sample=True, temperature=self.temperature)
        answer = output[0]["generated_text"][-1]["content"]
        tokenizer = self.generate.tokenizer
        return answer, {
            "prompt_tokens": len(tokenizer(prompt).input_ids),
            "completion_tokens": len(tokenizer(answer).input_ids),
        }


class Writer:
    """Asks a language model for modifications, within bounds, and remembers every answer and the tokens that it took.

    A pair whose answers were unusable `attempts` times is given up and not paid for again, by this run or one that
    goes on, unless more attempts or longer answers are allowed then. A pair that the endpoint did not answer is asked
    again by the next run. `.report` counts what this run did, and the tokens of all runs of this cache.

    Args:
        ask: an [`Endpoint`], a [`ChatModel`], or any function from a prompt to (text, usage) with a `.model` name.
        cache: file of JSON lines.
        attempts: at most this many requests a pair in a run, those for fields that an endpoint refuses aside, and
            answers of a pair in all runs.
        first_wait: seconds before the second attempt, doubled for each further one, unless the endpoint says how long.
        max_wait: never wait longer.
    """

    def __init__(self, ask: Callable, cache: Path, attempts: int = 4, first_wait: float = 1.0, max_wait: float = 60.0):
        self.ask, self.cache = ask, Path(cache)
        self.attempts, self.first_wait, self.max_wait = attempts, first_wait, max_wait
        self.max_tokens = getattr(ask, "max_tokens", None)
        self.known: dict[str, str] = {}
        self.unusable: Counter = Counter()  # answers, by key and how long they were allowed to be
        self.report: Counter = Counter()
        self.last = ""  # what went wrong, the last time something did
        self.unanswered = 0  # pairs in a row
        self.lock = threading.Lock()
        if self.cache.is_file():
            for line in self.cache.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    if "unusable" in row:
                        self.unusable[row["key"], row["max_tokens"]] += row["unusable"]
                    else:
                        self.known[row["key"]] = row["modification"]
                    self.report.update({name: row[name] for name in TOKENS if name in row})
                except (json.JSONDecodeError, KeyError, TypeError):
                    self.report["half-written lines of the cache"] += 1  # the run was stopped as it wrote

    def key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.ask.model}\n{prompt}".encode()).hexdigest()[:32]

    def write(self, pairs: Iterable[tuple[str, str]], workers: int = 8) -> Iterator[str | None]:
        """A modification for each (reference caption, target caption), in order; None where none could be had.

        Raises:
            ValueError: with what went wrong, when HOPELESS pairs in a row or more had no usable answer.
        """
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        pairs = iter(pairs)
        torn = self.cache.is_file() and self.cache.read_bytes()[-1:] not in (b"", b"\n")
        with self.cache.open("a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
            file.write("\n" if torn else "")
            ask = partial(self._one, file=file)
            # A little at a time, so that a run that is stopped does not wait for all that it had queued.
            while ahead := list(itertools.islice(pairs, 4 * workers)):
                different = dict.fromkeys(ahead)
                answers = dict(zip(different, pool.map(ask, different), strict=True))
                for pair in ahead:
                    text, counts = answers[pair]
                    self.report.update(counts)
                    if not counts["not asked again"]:
                        self.unanswered = self.unanswered + 1 if counts["given up"] else 0
                    answers[pair] = text, GIVEN_UP if text is None else FROM_CACHE
                    yield text
                if self.unanswered >= HOPELESS:
                    raise ValueError(
                        f"{self.ask.model} wrote nothing usable for {self.unanswered} pairs in a row, the last time: "
                        f"{self.last}. What it wrote before is in {self.cache}, and the same command goes on"
                    )

    def _one(self, pair: tuple[str, str], file: IO[str]) -> tuple[str | None, Counter]:
        """The pair's modification or None, and what it took, by name. `file` keeps what is new."""
        prompt = PROMPT.format(reference=pair[0], target=pair[1])
        key, counts = self.key(prompt), Counter()
        if key in self.known:
            return self.known[key], FROM_CACHE
        before = self.unusable[key, self.max_tokens]
        left = self.attempts - before
        if left < 1:
            self.last = self.last or f"unusable answers of a run before; --attempts above {self.attempts} asks again"
            return None, GIVEN_UP
        for attempt in range(left):
            wait = self.first_wait * 2**attempt
            try:
                answer, usage = self.ask(prompt)
                told = {name: usage.get(name) for name in TOKENS}
                counts.update({k: int(n) for k, n in told.items() if isinstance(n, (int, float)) and math.isfinite(n)})
                text = self.known[key] = parse_modification(answer)
                self._keep(file, {"key": key, "modification": text}, counts)
                return text, counts + Counter({"written": 1})
            except UnusableAnswer as error:
                self.unusable[key, self.max_tokens] += 1
                why = str(error)
                if usage.get("finish_reason") == "length":
                    why = f"cut off at {self.max_tokens} tokens, and --max_tokens allows more"
                counts[f"unusable answer: {why}"] += 1
                self.last = f"{why}: {answer[:200]!r}"
                wait = 0.0  # asking again at once may well help
            except EndpointError as error:
                counts[str(error)] += 1
                self.last = f"{error}: {error.reason}" if error.reason else str(error)
                if error.permanent:
                    break
                wait = error.wait if error.wait is not None else wait
            if attempt + 1 < left:
                time.sleep(min(wait, self.max_wait))
        if unusable := self.unusable[key, self.max_tokens] - before:
            self._keep(file, {"key": key, "unusable": unusable, "max_tokens": self.max_tokens}, counts)
        return None, counts + Counter({"given up": 1})

    def _keep(self, file: IO[str], row: dict, counts: Counter) -> None:
        row |= {name: counts[name] for name in TOKENS if name in counts}
        with self.lock:
            file.write(json.dumps(row) + "\n")
            file.flush()
