"""A language model as judge of open answers, over any endpoint that speaks OpenAI's chat protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vlmflow.evaluate.rows import rows_of, verdicts_of
from vlmflow.records.files import RecordError, read_json, write_json, write_text
from vlmflow.records.folder import SUMMARY, VERDICTS, Folder, claim, differences
from vlmflow.tasks import Rubric, Sample, TaskError

if TYPE_CHECKING:  # it loads torch, which options of the command line do not need
    from vlmflow.evaluate.evaluation import Evaluation

LONGEST_PAUSE = 60.0  # seconds


@dataclass(frozen=True)
class Verdict:
    """A judge's marks of one answer, or why there are none.

    ``asked`` counts the requests that went out (0 where the cache had the answer), ``model`` is the judge's name as
    the endpoint gives it.
    """

    sample: str
    marks: tuple[float, ...] | None
    reply: str | None
    failure: str | None
    model: str | None
    asked: int


@dataclass(frozen=True)
class Judge:
    """Marks answers by a rubric; replies are kept on disk by the content of the request.

    The key is read from the environment variable ``key_variable`` when the first request goes out (``check`` looks
    whether it is there), and is held by the client only: no field, error or record has it. ``base_url`` None means
    OpenAI's own endpoint, or the one that OPENAI_BASE_URL names. ``pause`` seconds before the first retry double with
    each further one.
    """

    model: str = "gpt-4o-2024-11-20"
    cache: Path | None = None
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    attempts: int = 5
    timeout: float = 60.0
    pause: float = 1.0
    workers: int = 4

    def __post_init__(self):
        if self.attempts < 1 or self.workers < 1:
            raise TaskError(f"Judge: attempts and workers must be at least 1, got {self.attempts} and {self.workers}")
        if not self.model.strip():
            raise TaskError(f"Judge: the judge's model must have a name, got {self.model!r}")
        self._endpoint()

    def check(self) -> None:
        """Find out beforehand what would end ``mark`` at its first request.

        Raises:
            TaskError: no client library, or no key.
        """
        _library()
        self._key()

    def mark(self, rubric: Rubric, answers: Iterable[tuple[Sample, str]]) -> Iterator[Verdict]:
        """A verdict for each (sample, answer), in order, as they come.

        A request that fails on the way is sent again up to ``attempts`` times, a reply that cannot be read asked for
        again as often. What then has no marks says why; nobody guesses them.

        Raises:
            TaskError: no key, no client library, or a key or model that the endpoint refuses.
        """
        asker = _Asker(self, rubric)
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                yield from pool.map(asker.verdict, answers)
            finally:
                pool.shutdown(cancel_futures=True)

    def dry_run(self, rubric: Rubric, answers: Iterable[tuple[Sample, str]], file: Path) -> int:
        """Write the requests that ``mark`` would begin with, one JSON object a line; how many they are.

        Needs no key and sends nothing.
        """
        lines = [
            json.dumps({"sample": sample.id, **self._request(rubric, sample, answer, 0)}, ensure_ascii=False)
            for sample, answer in answers
        ]
        write_text(file, "".join(line + "\n" for line in lines))
        return len(lines)

    def to_dict(self, rubric: Rubric) -> dict[str, Any]:
        """What a record must hold so that the marks can be given again: judge, endpoint, and prompt in full."""
        prompt = ("system", "template", "nudge", "temperature", "hotter", "max_tokens")
        judge = {"model": self.model, "endpoint": self._endpoint(), "attempts": self.attempts, "rubric": rubric.name}
        return {**judge, **{name: getattr(rubric, name) for name in prompt}}

    def _request(self, rubric: Rubric, sample: Sample, answer: str, attempt: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": rubric.messages(sample, answer, again=attempt > 0),
            "temperature": min(2.0, rubric.temperature + rubric.hotter * attempt),
            "max_tokens": rubric.max_tokens,
        }

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            problem = "holds characters that no key has" if key else "is not set"
            raise TaskError(
                f"Judge: the environment variable {self.key_variable} {problem}; it must hold the endpoint's key "
                "(any word, for a local endpoint that asks for none)"
            )
        return key

    def _endpoint(self) -> str:
        """The endpoint's address, refused if it may hold a secret: the client library logs it."""
        address = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise TaskError(
                "Judge: base_url must be http(s)://host[:port]/path, without user name, password or query; "
                f"the key belongs in the environment variable {self.key_variable}"
            )
        return address


class _RefusedError(Exception):
    """A request that did not give a text; worth another try or not."""

    def __init__(self, reason: str, again: bool, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.wait = again, wait


class _Asker:
    """One run's client, made at the first request so that cached answers need neither key nor library."""

    def __init__(self, judge: Judge, rubric: Rubric) -> None:
        self.judge, self.rubric = judge, rubric

    def verdict(self, pair: tuple[Sample, str]) -> Verdict:
        (sample, answer), judge = pair, self.judge
        sent, failure, reply, model = 0, None, None, None
        for attempt in range(judge.attempts):
            request = judge._request(self.rubric, sample, answer, attempt)
            path = self._path(request, attempt)
            kept = _recall(path)
            if kept is None:
                kept, times, failure = self._send(request)
                sent += times
                if kept is None:
                    break
                self._keep(path, request, kept)
            reply, model = kept["reply"], kept["model"]
            marks = self.rubric.read(reply)
            if marks is not None:
                return Verdict(sample.id, marks, reply, None, model, sent)
            failure = f"unreadable reply in {attempt + 1} attempts"
        return Verdict(sample.id, None, reply, failure, model, sent)

    def _send(self, request: dict[str, Any]) -> tuple[dict[str, Any] | None, int, str | None]:
        """The reply, how many requests that took, and what went wrong last."""
        failure = None
        for sent in range(1, self.judge.attempts + 1):
            try:
                return self._ask(request), sent, None
            except _RefusedError as refused:
                failure = str(refused)
                if not refused.again:
                    return None, sent, failure
                if sent < self.judge.attempts:
                    time.sleep(min(LONGEST_PAUSE, max(refused.wait, self.judge.pause * 2 ** (sent - 1))))
        return None, self.judge.attempts, f"{failure}, {self.judge.attempts} times"

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request. Nothing that the endpoint says about it is passed on: it may quote the key."""
        openai = _library()
        client = self._client
        try:
            answer = client.chat.completions.create(**request)
        except openai.APIStatusError as error:
            raise _from_status(error, self.judge) from None
        except openai.APITimeoutError:
            raise _RefusedError(f"no reply within {self.judge.timeout:g} s", again=True) from None
        except openai.APIConnectionError:
            raise _RefusedError("no connection", again=True) from None
        except (openai.APIError, ValueError):
            raise _RefusedError("malformed reply", again=True) from None
        try:
            text, model = answer.choices[0].message.content, answer.model
        except (AttributeError, IndexError, TypeError):
            raise _RefusedError("malformed reply", again=True) from None
        if not isinstance(text, str):
            raise _RefusedError("reply without text", again=True)
        return {"reply": self._without_key(text), "model": self._without_key(str(model))}

    def _without_key(self, text: str) -> str:
        """What the endpoint says, which may quote the key, as it may be kept."""
        return text.replace(self.judge._key(), "[key]")

    @cached_property
    def _client(self) -> Any:
        key, url = self.judge._key(), self.judge._endpoint()
        return _library().OpenAI(api_key=key, base_url=url, timeout=self.judge.timeout, max_retries=0)

    def _path(self, request: dict[str, Any], attempt: int) -> Path | None:
        """Where the reply is kept: by endpoint, rubric, request and attempt, so that a second attempt is a new one."""
        if self.judge.cache is None:
            return None
        content = [self.judge._endpoint(), self.rubric.name, attempt, request]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.judge.cache / digest[:2] / f"{digest}.json"

    def _keep(self, path: Path | None, request: dict[str, Any], kept: dict[str, Any]) -> None:
        if path is not None:
            record = {**kept, "rubric": self.rubric.name, "endpoint": self.judge._endpoint(), "request": request}
            write_text(path, json.dumps(record, ensure_ascii=False, indent=1))


def _recall(path: Path | None) -> dict[str, Any] | None:
    """A reply that was kept, and is whole."""
    with suppress(RecordError):
        kept = read_json(path) if path else {}
        if isinstance(kept.get("reply"), str) and isinstance(kept.get("model"), str):
            return kept
    return None


def mark(out: Path, evaluation: Evaluation, judge: Judge, samples: Sequence[Sample]) -> dict[str, Any]:
    """Have a judge mark a finished run's answers; the new summary. The judge's replies are kept in ``out/judge``.

    Raises:
        TaskError: a task without a rubric, no key, no client library, or a key or model that the endpoint refuses.
        RecordError: a run that is not finished, or whose answers another judge has marked.
    """
    rubric = evaluation.task.marked_by()
    record, summary = judge.to_dict(rubric), Folder(out).summary()
    with claim(out, summary["settings"]) as folder:
        earlier = verdicts_of(folder)
        if earlier and (differing := differences(earlier["judge"], record)):
            raise RecordError(
                f"{out} holds the marks of another judge: {'; '.join(differing)}. Copy the folder without {VERDICTS}, "
                "and have the copy marked"
            )
        kept = ("marks", "reply", "failure", "model")
        verdicts = {
            verdict.sample: {name: getattr(verdict, name) for name in kept}
            for verdict in judge.mark(rubric, _answered(folder, samples))
        }
        write_json(out / VERDICTS, {"judge": record, "verdicts": verdicts})
        summary |= evaluation.metric(folder)
        write_json(out / SUMMARY, summary)
        return summary


def why_unmarked(out: Path) -> str | None:
    """The commonest reason why answers have no marks, None where any has."""
    verdicts = (verdicts_of(Folder(out)) or {"verdicts": {}})["verdicts"].values()
    failures = Counter(verdict["failure"] for verdict in verdicts)
    return failures.most_common(1)[0][0] if failures and all(verdict["marks"] is None for verdict in verdicts) else None


def write_requests(out: Path, evaluation: Evaluation, judge: Judge, samples: Sequence[Sample]) -> int:
    """Write what ``mark`` would send to ``out/requests.jsonl``; how many requests."""
    return judge.dry_run(evaluation.task.marked_by(), _answered(Folder(out), samples), out / "requests.jsonl")


def _answered(folder: Folder, samples: Sequence[Sample]) -> list[tuple[Sample, str]]:
    """The samples that were answered, with their answers."""
    rows = rows_of(folder).read()
    return [(sample, rows[sample.id].answer) for sample in samples if rows[sample.id].failure is None]


def _library() -> Any:
    try:
        import openai
    except ImportError:
        raise TaskError('the judge needs the "openai" package: pip install "vlmflow[eval]"') from None
    return openai


def _from_status(error: Any, judge: Judge) -> _RefusedError | TaskError:
    """The error that an HTTP status means; 401, 403 and 404 would meet every answer, so they end the run."""
    status = error.status_code
    code = error.code if isinstance(error.code, str) and re.fullmatch("[a-z_]{1,40}", error.code) else None
    said = f"HTTP {status}" + (f" {code}" if code else "")
    if status in (401, 403, 404):
        hints = {401: f"is the key in {judge.key_variable} right?", 403: "may this key use the model?"}
        hint = hints.get(status, f"is the endpoint right, and has it a model {judge.model!r}?")
        return TaskError(f"Judge: {judge._endpoint()} says {said}: {hint}")
    wait = 0.0
    with suppress(ValueError):
        wait = float(error.response.headers.get("retry-after", ""))
    return _RefusedError(said, again=status in (408, 409, 429) or status >= 500, wait=wait)
