"""The judge against a real server that speaks the OpenAI protocol, with all that can go wrong on the way."""

import json
import logging
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlmflow.cli import app
from vlmflow.evaluate.judge import Judge
from vlmflow.models import VLM
from vlmflow.pico import samples as pico_samples
from vlmflow.tasks import TASKS, Picture, Sample, TaskError

pytest.importorskip("openai")
KEY = "sk-secret-4711"
RUBRIC = TASKS["mmvet"].rubric
assert RUBRIC is not None


def sample(key: str) -> Sample:
    return Sample(key, (Picture(key, b""),), question=f"What is {key}?", answer="5<OR>6", group="ocr")


ANSWERS = [(sample(str(i)), f"It is {i}.") for i in range(6)]


def reply(text: str | None) -> tuple[int, object]:
    message = {"role": "assistant", "content": text}
    return 200, {
        "id": "x", "object": "chat.completion", "created": 0, "model": "judge-2026-01-01",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }  # fmt: skip


Script = Callable[[dict[str, Any], int], tuple[Any, ...]]  # status, content and, at will, headers


class Server(ThreadingHTTPServer):
    """Answers by ``script``, a function of the request and of how often it has come; keeps all requests."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            before = sum(kept["messages"] == request["messages"] for kept in self.server.requests)
            self.server.requests.append(request)
            self.server.keys.add(self.headers["Authorization"])
        assert self.path == "/v1/chat/completions"
        status, body, *more = self.server.script(request, before)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in dict(*more).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            pass  # the client's time was up

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch):
    """Start a server with a script."""
    servers: list[Server] = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def start(script: Script) -> Server:
        server = Server(script)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge(server: Server, **fields) -> Judge:
    return Judge(**{"base_url": server.url, "pause": 0.001, "timeout": 5.0, **fields})


def number(request: dict[str, Any]) -> int:
    """Which answer a request is about."""
    return int(request["messages"][-1]["content"].rsplit("What is ", 1)[1][0])


def test_marks_in_order(serve, tmp_path):
    server = serve(lambda request, before: reply(f"0.{number(request)}"))
    found = list(judge(server, cache=tmp_path).mark(RUBRIC, ANSWERS))
    assert [verdict.sample for verdict in found] == list("012345")
    assert [verdict.marks for verdict in found] == [(i / 10,) for i in range(6)]
    assert {(verdict.failure, verdict.model, verdict.asked) for verdict in found} == {(None, "judge-2026-01-01", 1)}
    assert server.keys == {f"Bearer {KEY}"}
    (request,) = [request for request in server.requests if number(request) == 3]
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("gpt-4o-2024-11-20", 3, 0)
    assert request["messages"][0]["content"].endswith("What is 3? | 5 <OR> 6 | It is 3. | ")


def test_cache_needs_no_second_request_and_no_key(serve, tmp_path, monkeypatch):
    server = serve(lambda request, before: reply("0.5"))
    ours = judge(server, cache=tmp_path)
    first = list(ours.mark(RUBRIC, ANSWERS[:3]))
    monkeypatch.delenv("OPENAI_API_KEY")
    again = list(ours.mark(RUBRIC, ANSWERS[:3]))
    assert [v.marks for v in again] == [v.marks for v in first] == [(0.5,)] * 3
    assert ([v.asked for v in again], len(server.requests)) == ([0, 0, 0], 3)
    for other in (judge(server, cache=tmp_path, model="other"), ours):
        pair = (ANSWERS[0][0], "something else" if other is ours else ANSWERS[0][1])
        with pytest.raises(TaskError, match="OPENAI_API_KEY is not set"):
            list(other.mark(RUBRIC, [pair]))  # another request: not in the cache
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 3
    assert not list(tmp_path.rglob("*.tmp"))
    record = json.loads(files[0].read_text())
    assert record["request"]["messages"]
    assert record["model"] == "judge-2026-01-01"


def test_damaged_cache_is_asked_for_again(serve, tmp_path):
    server = serve(lambda request, before: reply("0.5"))
    ours = judge(server, cache=tmp_path)
    list(ours.mark(RUBRIC, ANSWERS[:1]))
    (file,) = tmp_path.rglob("*.json")
    for damage in ("", "{", "[]", '{"reply": 5}'):
        file.write_text(damage)
        (verdict,) = ours.mark(RUBRIC, ANSWERS[:1])
        assert (verdict.marks, verdict.asked) == ((0.5,), 1)


def test_errors_on_the_way_are_tried_again(serve):
    def script(request, before):
        trouble = [
            (429, {"error": {"message": f"slow down {KEY}", "code": "rate_limit_exceeded"}}),
            (500, {"error": {"message": "oops"}}),
            (200, b'{"choices": [{"mess'),
            (200, {"choices": []}),
            (408, {}),
            (409, {}),
        ]
        return trouble[before] if before < len(trouble) else reply("0.7")

    server = serve(script)
    found = list(judge(server, attempts=7).mark(RUBRIC, ANSWERS[:2]))
    assert [(v.marks, v.failure, v.asked) for v in found] == [((0.7,), None, 7)] * 2


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ((429, {"error": {"message": KEY, "code": "rate_limit_exceeded"}}), "HTTP 429 rate_limit_exceeded, 3 times"),
        ((503, b"<html>"), "HTTP 503, 3 times"),
        ((200, b"not json"), "malformed reply, 3 times"),
        ((200, {"choices": None}), "malformed reply, 3 times"),
        ((200, b"[]"), "malformed reply, 3 times"),
        (reply(None), "reply without text, 3 times"),
        ((400, {"error": {"message": KEY, "code": f"{KEY}"}}), "HTTP 400"),
        ((400, {"error": {"message": "x", "code": "context_length_exceeded"}}), "HTTP 400 context_length_exceeded"),
        (reply("no idea"), "unreadable reply in 3 attempts"),
    ],
)
def test_what_fails_is_counted_and_not_guessed(serve, answer, failure):
    server = serve(lambda request, before: answer if number(request) == 1 else reply("1.0"))
    found = list(judge(server, attempts=3).mark(RUBRIC, ANSWERS[:3]))
    assert [verdict.marks for verdict in found] == [(1.0,), None, (1.0,)]
    assert found[1].failure == failure
    task = TASKS["mmvet"]
    outcomes = [task.outcome(s, text, verdict=v.marks) for (s, text), v in zip(ANSWERS, found, strict=False)]
    metric = task.metric(outcomes)
    assert (metric["value"], metric["n"], metric["excluded"]) == (100, 2, 1)


def test_failures_are_not_cached(serve, tmp_path):
    broken = [True]
    server = serve(lambda request, before: (500, {}) if broken[0] else reply("0.5"))
    ours = judge(server, attempts=2, cache=tmp_path)
    assert [v.marks for v in ours.mark(RUBRIC, ANSWERS[:2])] == [None, None]
    broken[0] = False
    assert [v.marks for v in ours.mark(RUBRIC, ANSWERS[:2])] == [(0.5,), (0.5,)]


def test_a_reply_serves_no_other_rubric_endpoint_or_attempt(serve, tmp_path):
    """Though the request is the same to the word."""
    half, whole = serve(lambda request, before: reply("0.5")), serve(lambda request, before: reply("1.0"))
    named = replace(RUBRIC, name="mm-vet-v9")
    for server, rubric, marks in ((half, RUBRIC, 0.5), (whole, RUBRIC, 1.0), (half, named, 0.5), (whole, named, 1.0)):
        for asked in (1, 0):
            (verdict,) = judge(server, cache=tmp_path).mark(rubric, ANSWERS[:1])
            assert (verdict.marks, verdict.asked) == ((marks,), asked)
    steady = replace(RUBRIC, name="steady", hotter=0.0, nudge="")
    late = serve(lambda request, before: reply("0.5" if before else "good"))
    (verdict,) = judge(late, cache=tmp_path).mark(steady, ANSWERS[:1])
    assert (verdict.marks, verdict.asked) == ((0.5,), 2)
    assert len(late.requests) == 2


def test_unreadable_replies_are_asked_for_again_warmer(serve, tmp_path):
    server = serve(lambda request, before: reply("0.5" if request["temperature"] >= 1 else "good"))
    ours = judge(server, cache=tmp_path)
    (verdict,) = ours.mark(RUBRIC, ANSWERS[:1])
    assert (verdict.marks, verdict.asked) == ((0.5,), 3)
    assert [request["temperature"] for request in server.requests] == [0, 0.5, 1]
    nudged = [request["messages"][0]["content"].endswith("(digit): ") for request in server.requests]
    assert nudged == [False, True, True]
    (again,) = ours.mark(RUBRIC, ANSWERS[:1])
    assert (again.marks, again.asked) == ((0.5,), 0)


def test_time_out(serve):
    def script(request, before):
        if before < 2:
            time.sleep(3)
        return reply("0.5")

    server = serve(script)
    (verdict,) = judge(server, timeout=1.0).mark(RUBRIC, ANSWERS[:1])
    assert (verdict.marks, verdict.asked) == ((0.5,), 3)
    server = serve(lambda request, before: (time.sleep(0.5), reply("0.5"))[1])
    (verdict,) = judge(server, timeout=0.1, attempts=2).mark(RUBRIC, ANSWERS[:1])
    assert verdict.failure == "no reply within 0.1 s, 2 times"


def test_no_server(serve):
    server = serve(lambda request, before: reply("0.5"))
    ours = judge(server, attempts=2)
    server.shutdown()
    server.server_close()
    (verdict,) = ours.mark(RUBRIC, ANSWERS[:1])
    assert verdict.failure == "no connection, 2 times"


@pytest.mark.parametrize(
    ("asked", "slept"),
    [
        ([None, None, None], [1, 2, 4]),
        (["7", "0.5", "3"], [7, 2, 4]),
        (["1000", "Wed, 21 Oct 2015 07:28:00 GMT", "-3"], [60, 2, 4]),
    ],
)
def test_pauses_double_and_heed_the_server(serve, monkeypatch, asked, slept):
    pauses: list[float] = []
    monkeypatch.setattr("vlmflow.evaluate.judge.time.sleep", pauses.append)
    waits = [{"Retry-After": wait} if wait else {} for wait in [*asked, None]]
    server = serve(lambda request, before: (429, {}, waits[before]))
    list(judge(server, attempts=4, pause=1.0).mark(RUBRIC, ANSWERS[:1]))
    assert pauses == slept


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, "is the key in OPENAI_API_KEY right"),
        (403, "may this key use the model"),
        (404, "has it a model 'm'"),
    ],
)
def test_a_refusal_of_all_ends_the_run(serve, status, hint):
    said = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}
    server = serve(lambda request, before: (status, said))
    with pytest.raises(TaskError, match=hint) as caught:
        list(judge(server, model="m").mark(RUBRIC, ANSWERS))
    assert f"HTTP {status} invalid_api_key" in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_the_key_is_nowhere(serve, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)

    def script(request, before):
        return [(429, {"error": {"message": KEY}}), reply("hm"), reply("0.5")][min(before, 2)]

    server = serve(script)
    ours = judge(server, cache=tmp_path / "cache")
    found = list(ours.mark(RUBRIC, ANSWERS[:2]))
    assert all(verdict.marks == (0.5,) for verdict in found)
    ours.dry_run(RUBRIC, ANSWERS, tmp_path / "requests.jsonl")
    seen = [repr(found), json.dumps(ours.to_dict(RUBRIC)), caplog.text]
    seen += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(seen) > 4
    assert not [text for text in seen if KEY in text]


@pytest.mark.parametrize(("value", "problem"), [(None, "is not set"), ("  ", "is not set"), ("k€y", "no key has")])
def test_needs_a_key(serve, monkeypatch, value, problem):
    server = serve(lambda request, before: reply("0.5"))
    monkeypatch.delenv("OPENAI_API_KEY")
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(
        TaskError, match=rf"the environment variable MY_KEY .*{problem}.*; it must hold the endpoint's key"
    ):
        list(judge(server, key_variable="MY_KEY").mark(RUBRIC, ANSWERS))
    assert not server.requests


def test_needs_its_library(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(TaskError, match=r'pip install "vlmflow\[eval\]"'):
        list(Judge().mark(RUBRIC, ANSWERS))


def test_dry_run_sends_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    file = tmp_path / "new" / "requests.jsonl"
    assert Judge(model="m").dry_run(RUBRIC, ANSWERS, file) == 6
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["sample"] for row in rows] == list("012345")
    assert set(rows[0]) == {"sample", "model", "messages", "temperature", "max_tokens"}
    assert [path.name for path in Path(file.parent).iterdir()] == ["requests.jsonl"]


def test_the_record_holds_the_prompt(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://judge.example:8443/v1")
    record = Judge(model="m").to_dict(RUBRIC)
    assert record["endpoint"] == "https://judge.example:8443/v1"
    assert (record["model"], record["rubric"], record["max_tokens"]) == ("m", "mm-vet-v1", 3)
    assert record["template"] == RUBRIC.template


def test_refuses_what_cannot_work_or_may_leak():
    with pytest.raises(TaskError, match="attempts and workers must be at least 1"):
        Judge(attempts=0)
    with pytest.raises(TaskError, match="the judge's model must have a name"):
        Judge(model=" ")
    for address in (f"https://me:{KEY}@x/v1", f"https://x/v1?key={KEY}", f"{KEY}", f"ftp://{KEY}/v1"):
        with pytest.raises(TaskError, match="must be http") as caught:
            Judge(base_url=address)
        assert KEY not in str(caught.value)


# -- the command line


@pytest.fixture
def command(tmp_path):
    """Evaluate three questions, in MM-Vet's own format."""
    (tmp_path / "vet/images").mkdir(parents=True)
    entries = {}
    for number, scene in enumerate(pico_samples()[:3]):
        shutil.copy(scene.image, tmp_path / f"vet/images/{number}.png")
        question = {"imagename": f"{number}.png", "question": f"What is {number}?", "answer": "a cat"}
        entries[f"v1_{number}"] = {**question, "capability": ["rec"]}
    (tmp_path / "vet/mm-vet.json").write_text(json.dumps(entries))
    args = ["eval", "--task", "mmvet", "--source", tmp_path / "vet", "--max-new-tokens", "3", "--out", tmp_path / "out"]

    def run(*more):
        options = args[3:] if "--task" in more else args[1:]  # an option that is given twice is refused
        return CliRunner().invoke(app, ["eval", *(str(arg) for arg in (*options, *more))], catch_exceptions=False)

    return run


def held(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def answers(out: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (out / "rows.jsonl").read_text().splitlines()]


def test_eval_has_a_judge_mark_the_answers(serve, command, tmp_path):
    server, out = serve(lambda request, before: reply(f"0.{number(request)}")), tmp_path / "out"
    made = command("--judge", "j", "--judge-url", server.url, "--json")
    assert made.exit_code == 0, made.output
    summary = json.loads(made.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["metric"]["value"] == pytest.approx(10)
    assert (summary["metric"]["n"], summary["metric"]["excluded"]) == (3, 0)
    assert (summary["judge"]["model"], summary["judge"]["endpoint"]) == ("j", server.url)
    sent = sorted(request["messages"][0]["content"].rsplit("\n", 1)[1] for request in server.requests)
    assert sent == [f"What is {i}? | a cat | {answer} | " for i, answer in enumerate(answers(out))]
    verdicts = json.loads((out / "verdicts.json").read_text())["verdicts"]
    assert {key: own["marks"] for key, own in verdicts.items()} == {"v1_0": [0], "v1_1": [0.1], "v1_2": [0.2]}
    before = held(out)
    assert not [name for name, content in before.items() if KEY.encode() in content]
    assert KEY not in made.output
    again = command("--judge", "j", "--judge-url", server.url)
    assert again.exit_code == 0, again.output
    other = command("--judge", "k", "--judge-url", server.url)
    assert other.exit_code == 2
    assert 'holds the marks of another judge: model was "j", is "k"' in other.stderr
    assert held(out) == before
    assert len(server.requests) == 3


def test_eval_writes_what_it_would_ask_the_judge(command, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    made = command("--judge", "j", "--dry-run")
    assert made.exit_code == 0, made.output
    assert "wrote 3 requests to" in made.stderr
    requests = [json.loads(line) for line in (tmp_path / "out/requests.jsonl").read_text().splitlines()]
    assert [(request["sample"], request["model"]) for request in requests] == [(f"v1_{i}", "j") for i in range(3)]
    for request, answer in zip(requests, answers(tmp_path / "out"), strict=True):
        assert request["messages"][0]["content"].endswith(f"| a cat | {answer} | ")
    assert not (tmp_path / "out/verdicts.json").exists()


def test_a_judge_that_fails_costs_no_answer_and_no_mark(serve, command, tmp_path, monkeypatch):
    said, out = [401], tmp_path / "out"
    server = serve(lambda request, before: (said[0], {}) if said and number(request) else reply("0.5"))
    judged = ["--judge", "j", "--judge-url", server.url]
    monkeypatch.setattr("vlmflow.evaluate.judge.time.sleep", lambda seconds: None)
    refused = command(*judged)
    assert refused.exit_code == 2
    assert "is the key in OPENAI_API_KEY right?" in refused.stderr
    rows, summary = (out / "rows.jsonl").read_bytes(), json.loads((out / "summary.json").read_text())
    assert len(answers(out)) == 3
    assert (summary["metric"]["value"], summary["metric"]["excluded"], summary["judge"]) == (None, 3, None)

    monkeypatch.setattr(VLM, "generate", None)  # nothing is answered again
    said[0] = 503
    partly = command(*judged, "--json")
    assert partly.exit_code == 0, partly.output
    assert "2, left out" in partly.stderr
    metric = json.loads(partly.stdout)["metric"]
    assert (metric["value"], metric["n"], metric["excluded"]) == (50, 1, 2)
    verdicts = json.loads((out / "verdicts.json").read_text())["verdicts"]
    assert [own["failure"] for own in verdicts.values()] == [None, *["HTTP 503, 5 times"] * 2]

    said.clear()
    whole = command(*judged, "--json")
    metric = json.loads(whole.stdout)["metric"]
    assert (metric["value"], metric["n"], metric["excluded"]) == (50, 3, 0)
    assert (out / "rows.jsonl").read_bytes() == rows
    assert [number(request) for request in server.requests].count(0) == 1  # kept from before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--judge", "j"], "OPENAI_API_KEY is not set"),
        (["--judge", ""], "must have a name"),
        (["--judge-url", "http://localhost:1/v1"], "--judge-url goes with --judge"),
        (["--dry-run"], "--dry-run goes with --judge"),
        (["--judge", "j", "--task", "pico"], "pico is scored by its rules and needs no judge"),
        (["--judge", "j", "--task", "pico", "--dry-run"], "pico is scored by its rules and needs no judge"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_judge_that_cannot_be_is_refused_before_a_model_is_loaded(command, tmp_path, monkeypatch, args, says):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = command("--model", "no/such/model", *args)
    assert made.exit_code == 2, made.output
    assert made.stdout == ""
    (line,) = made.stderr.strip().split("\n")
    assert says in line
    assert not (tmp_path / "out").exists()


def test_a_judge_without_its_library_is_refused_before_a_model_is_loaded(command, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "openai", None)
    made = command("--model", "no/such/model", "--judge", "j")
    assert (made.exit_code, made.stdout) == (2, "")
    assert 'pip install "vlmflow[eval]"' in made.stderr


def test_a_key_that_a_reply_quotes_is_in_no_file(serve, command, tmp_path):
    server = serve(lambda request, before: reply(f"0.5 said {KEY}"))
    made = command("--judge", "j", "--judge-url", server.url)
    assert KEY not in made.output
    kept = held(tmp_path / "out")
    assert any(b"[key]" in content for content in kept.values())
    assert not [name for name, content in kept.items() if KEY.encode() in content]


def test_a_judge_that_marks_nothing_ends_with_its_commonest_failure(serve, command):
    server = serve(lambda request, before: (400, {}) if number(request) else (422, {}))
    made = command("--judge", "j", "--judge-url", server.url)
    assert made.exit_code == 1
    assert made.stderr.rstrip().endswith("no answer (HTTP 400, for most); the same command asks it again")
