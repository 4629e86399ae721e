"""Against an endpoint that the test starts on loopback: good answers, garbage, refusals, timeouts, 429s."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer

import pytest
import torch
from language_model import ChatModel, Endpoint, EndpointError, UnusableAnswer, Writer, parse_modification
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


GOOD = '{"modification": "make it red"}'


class Server:
    """Answers each request by the next of a script's behaviours; the last one stays."""

    def __init__(self):
        self.script, self.requests, self.headers = [], [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                server.headers.append(dict(self.headers))
                behaviour = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                if behaviour == "hang":
                    time.sleep(1.5)
                status, content, headers = behaviour if isinstance(behaviour, tuple) else (200, behaviour, {})
                body = content
                if status == 200 and content != "not json":
                    usage = {"prompt_tokens": 50, "completion_tokens": 9}
                    body = json.dumps({"choices": [{"message": {"content": content}}], "usage": usage})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that had no more patience
                    self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def write(server, tmp_path):
    def run(script, pairs=1, attempts=3, timeout=0.5, **options):
        server.script = list(script)
        endpoint = Endpoint(server.url, "model", api_key="secret", timeout=timeout)
        writer = Writer(endpoint, tmp_path / "answers.jsonl", attempts, first_wait=0.01, **options)
        return list(writer.write([(f"a star {i}", "a ring") for i in range(pairs)], workers=1)), dict(writer.report)

    return run


@pytest.mark.parametrize(
    "answer",
    [GOOD, f"Sure!\n```json\n{GOOD}\n```", '{"modification": "  make\\n it red "}', f"{GOOD} Anything else?",
     f'<think>They want {{"modification": "..."}}, of the set {{red, blue}}.</think>{GOOD}',
     f'{{"modification": "make it blue"}} No, rather: {GOOD}', f'{GOOD} as {{"modification": "..."}}'],
)  # fmt: skip
def test_modifications_are_found_in_answers(answer):
    assert parse_modification(answer) == "make it red"


@pytest.mark.parametrize(
    "answer",
    ["I cannot help with that.", "", "{}", '{"modification": 3}', '{"modification": " "}', "{broken", '["x"]',
     '{"modification": "..."}', '{"a":' * 5000,
     json.dumps({"modification": "word " * 41}), '{"modification": "half an emoji \\ud83d"}'],
)  # fmt: skip
def test_unusable_answers_are_refused(answer):
    with pytest.raises(UnusableAnswer):
        parse_modification(answer)


def test_good_answers_are_kept_and_never_paid_twice(server, write, tmp_path):
    found, report = write([GOOD], pairs=5)
    assert found == ["make it red"] * 5
    assert report == {"written": 5, "prompt_tokens": 250, "completion_tokens": 45}
    prompt = server.requests[0]["messages"][0]["content"]
    assert "First: a star 0\nSecond: a ring" in prompt and server.headers[0]["Authorization"] == "Bearer secret"
    # The run goes on with two pairs more, after it was stopped while it wrote a line.
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "half')
    found, report = write([GOOD], pairs=7)
    assert found == ["make it red"] * 7 and len(server.requests) == 7
    assert report["from cache"] == 5 and report["written"] == 2
    found, report = write([GOOD], pairs=7)  # what was written behind the torn line is known, too
    assert report["from cache"] == 7 and len(server.requests) == 7


def test_garbage_and_refusals_are_asked_again_and_then_given_up(server, write):
    found, report = write(["I cannot help with that.", GOOD], pairs=1)
    assert found == ["make it red"] and report["unusable answer: no JSON with a modification"] == 1
    found, report = write(["Never."], pairs=2)
    assert found == ["make it red", None] and report["given up"] == 1
    assert report["unusable answer: no JSON with a modification"] == 3 and len(server.requests) == 5


def test_busy_servers_are_waited_for(server, write):
    busy = (429, "slow down", {"Retry-After": "0.2"})
    start = time.perf_counter()
    found, report = write([busy, (503, "", {}), GOOD])
    assert found == ["make it red"] and report["HTTP 429"] == report["HTTP 503"] == 1
    assert time.perf_counter() - start > 0.2
    start = time.perf_counter()
    found, _ = write([(429, "", {"Retry-After": "3600"})], pairs=2, max_wait=0.05)
    assert found[1] is None and time.perf_counter() - start < 2  # bounded, whatever the server asks for


def test_a_model_that_never_writes_anything_usable_is_not_paid_to_the_end(server, write, monkeypatch, tmp_path):
    """As one that thinks for longer than its answer may be."""
    monkeypatch.setattr("language_model.HOPELESS", 6)
    with pytest.raises(ValueError, match=r"nothing usable for \d pairs in a row, the last time: .*'<think> I must"):
        write(["<think> I must look at both"], pairs=200, attempts=1)
    assert len(server.requests) <= 12
    (tmp_path / "answers.jsonl").unlink()  # else they are known as given up
    found, _ = write(["No.", "No.", "No.", "No.", "No.", GOOD, "No.", "No.", "No.", "No.", GOOD], 12, attempts=1)
    assert [text is None for text in found] == [True] * 5 + [False] + [True] * 4 + [False] * 2


def test_pairs_that_were_refused_are_not_paid_again_and_do_not_stop_the_run_that_goes_on(server, write, monkeypatch):
    """What was written between them comes from the cache."""
    monkeypatch.setattr("language_model.HOPELESS", 3)
    found, first = write(["No.", GOOD] * 5, pairs=10, attempts=1)
    assert [text is None for text in found] == [True, False] * 5
    found, report = write([GOOD], pairs=12, attempts=1)
    assert [text is None for text in found] == [True, False] * 5 + [False] * 2 and len(server.requests) == 12
    assert report["from cache"] == 5 and report["given up"] == 5 and report["written"] == 2
    assert first["prompt_tokens"] == 500 and report["prompt_tokens"] == 600 and report["completion_tokens"] == 108
    found, report = write([GOOD], pairs=12, attempts=2)  # one more of each than before
    assert None not in found and report["written"] == 5 and len(server.requests) == 17


def test_pairs_that_were_refused_are_asked_again_once_answers_may_be_longer(server, tmp_path):
    server.script = ["<think> I must", GOOD]
    for max_tokens, expected in ((9, None), (9, None), (99, "make it red")):
        ask = Endpoint(server.url, "model", max_tokens=max_tokens)
        assert list(Writer(ask, tmp_path / "answers.jsonl", attempts=1).write([("a star", "a ring")])) == [expected]
    assert len(server.requests) == 2


def test_pairs_that_an_endpoint_did_not_answer_are_asked_again(server, write):
    assert write([(401, "no key", {})])[0] == write([(503, "", {})], attempts=1)[0] == [None]
    assert write([GOOD])[0] == ["make it red"] and len(server.requests) == 3


def test_answers_are_kept_as_they_come(server, tmp_path):
    """Not in the order of pairs: a slow answer would hold back the others', which a killed run would pay again."""
    server.script = ["hang", GOOD]
    writer = Writer(Endpoint(server.url, "model"), tmp_path / "answers.jsonl")
    found = writer.write([(f"a star {i}", "a ring") for i in range(8)], workers=2)
    thread = threading.Thread(target=list, args=[found])
    thread.start()
    time.sleep(0.8)  # the first answers after 1.5 seconds
    kept = len((tmp_path / "answers.jsonl").read_text("utf-8").splitlines())
    thread.join()
    assert kept == 7 and len((tmp_path / "answers.jsonl").read_text("utf-8").splitlines()) == 8


def test_what_a_server_says_of_an_error_is_told(server, write, monkeypatch):
    monkeypatch.setattr("language_model.HOPELESS", 2)
    with pytest.raises(ValueError, match="the last time: HTTP 400: .*Use 'max_completion_tokens'"):
        write([(400, '{"error": "Unsupported.\n Use \'max_completion_tokens\'"}', {})], pairs=4)


def test_a_redirect_is_told_and_the_key_goes_nowhere_else(server, write, monkeypatch):
    """Which urllib would follow with the key, and without the prompt."""
    monkeypatch.setattr("language_model.HOPELESS", 1)
    elsewhere = Server()
    headers = []

    def do_GET(handler):
        headers.append(dict(handler.headers))
        handler.send_error(404)

    elsewhere.http.RequestHandlerClass.do_GET = do_GET
    try:
        with pytest.raises(ValueError, match=rf"the last time: HTTP 302: it has moved to {elsewhere.url}/elsewhere"):
            write([(302, "", {"Location": f"{elsewhere.url}/elsewhere"})])
    finally:
        elsewhere.http.shutdown()
        elsewhere.http.server_close()
    assert len(server.requests) == 1 and not headers


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
        b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"message": {"content": ["a list"]}}]}',
        b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"message": {"content": "{}"}}], "usage": "much"}',
        b"HTTP/1.1 200 OK\r\n\r\n[]",
        b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "n/a"}}',
        b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": [1]}}',
        b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": NaN}}',
        b"",
    ],
)
def test_no_reply_ends_the_run(tmp_path, reply):
    class Handler(BaseRequestHandler):
        count = 0

        def handle(self):
            self.request.recv(65536)
            Handler.count += 1
            good = json.dumps({"choices": [{"message": {"content": GOOD}}]}).encode()
            self.request.sendall(reply if Handler.count == 1 else b"HTTP/1.1 200 OK\r\n\r\n" + good)

    with TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", "model", timeout=5)
        writer = Writer(endpoint, tmp_path / "answers.jsonl", attempts=2, first_wait=0.01)
        found = list(writer.write([("a", "b"), ("c", "d")], workers=1))
        server.shutdown()
    assert found == ["make it red"] * 2 and Handler.count == 3


def test_an_answer_that_was_cut_off_is_told_as_such(server, write, tmp_path):
    """As of a model that used up its tokens by thinking."""
    cut = {"choices": [{"message": {"content": ""}, "finish_reason": "length"}], "usage": {"completion_tokens": 120}}
    found, report = write([(201, json.dumps(cut), {})], attempts=2)
    assert found == [None] and report["completion_tokens"] == 240
    assert report["unusable answer: cut off at 120 tokens, and --max_tokens allows more"] == 2
    whole = {"choices": [{"message": {"content": GOOD}, "finish_reason": "length"}]}
    assert write([(201, json.dumps(whole), {})], pairs=2, attempts=2)[0] == [None, "make it red"]


def test_what_to_do_about_unusable_answers_of_a_run_before_is_told(server, write, tmp_path):
    write(["no"], attempts=2)
    writer = Writer(Endpoint(server.url, "model"), tmp_path / "answers.jsonl", 2)
    assert list(writer.write([("a star 0", "a ring")])) == [None]
    assert writer.last == "unusable answers of a run before; --attempts above 2 asks again"


def test_how_long_an_answer_may_be_can_be_told(server):
    server.script = [GOOD]
    Endpoint(server.url, "model", max_tokens=2000)("x")
    assert server.requests[0]["max_tokens"] == 2000


def refusal(field: str) -> tuple:
    error = {
        "message": f"Unsupported: '{field}'",
        "type": "invalid_request_error",
        "param": field,
        "code": "unsupported",
    }
    return 400, json.dumps({"error": error}), {}


def test_what_a_models_endpoint_does_not_know_is_asked_its_way(server, write):
    """As OpenAI's models that think first refuse `max_tokens` and any temperature but their own."""
    found, report = write([refusal("max_tokens"), refusal("temperature"), GOOD], pairs=3, attempts=1)
    assert found == ["make it red"] * 3 and report["written"] == 3 and "HTTP 400" not in report
    sent = [set(request) - {"model", "messages"} for request in server.requests]
    assert sent == [{"temperature", "max_tokens"}, {"temperature", "max_completion_tokens"},
                    *[{"max_completion_tokens"}] * 3]  # fmt: skip
    assert server.requests[-1]["max_completion_tokens"] == 120


def test_a_field_refused_for_one_prompt_alone_is_sent_with_the_next(server, write):
    """As of one too long for the model, where the new name is not known either; the first reason is told."""
    found, report = write([refusal("max_tokens"), (422, "unknown field", {}), GOOD], pairs=2, attempts=1)
    assert found == [None, "make it red"] and report["HTTP 400"] == 1 and "HTTP 422" not in report
    assert server.requests[-1]["max_tokens"] == 120 and "max_completion_tokens" not in server.requests[-1]


def test_a_field_that_is_refused_again_ends_the_attempt(server, write):
    found, report = write([refusal("temperature")])
    assert found == [None] and report == {"HTTP 400": 1, "given up": 1} and len(server.requests) == 2
    for field in ("model", "messages", ""):
        server.requests.clear()
        found, report = write([refusal(field)])
        assert found == [None] and report == {"HTTP 400": 1, "given up": 1} and len(server.requests) == 1


def test_equal_pairs_are_asked_once(server, tmp_path):
    server.script = [GOOD]
    writer = Writer(Endpoint(server.url, "model"), tmp_path / "answers.jsonl")
    assert list(writer.write([("a star", "a ring")] * 9, workers=8)) == ["make it red"] * 9
    assert len(server.requests) == 1 and writer.report["written"] == 1 and writer.report["from cache"] == 8
    server.script = ["No."]
    writer = Writer(Endpoint(server.url, "model"), tmp_path / "others.jsonl", attempts=2)
    assert list(writer.write([("a star", "a ring")] * 9, workers=1)) == [None] * 9  # of three blocks
    assert len(server.requests) == 3 and writer.report["given up"] == 9


def test_a_key_that_cannot_be_sent_is_told_at_once_and_not_shown(server, tmp_path):
    server.script = [GOOD]
    assert Endpoint(server.url, "model", api_key="sk-abc\n")("x")[0] == GOOD  # as files and shells end
    assert server.headers[0]["Authorization"] == "Bearer sk-abc"
    for key in ("sk-a\nbc", "sk-\u2019bc"):
        writer = Writer(Endpoint(server.url, "model", api_key=key), tmp_path / "answers.jsonl", first_wait=9)
        assert list(writer.write([("a", "b")])) == [None]
        assert "API key" in writer.last and "sk-" not in writer.last and sum(writer.report.values()) == 2


def test_timeouts_and_broken_replies_are_bounded(server, write):
    found, report = write(["hang", "not json", GOOD], timeout=0.3)
    assert found == ["make it red"] and report["an answer that is no chat completion"] == 1
    assert any("timeout" in name for name in report)


def test_what_cannot_succeed_is_not_tried_again(server, write):
    found, report = write([(401, "no key", {})])
    assert found == [None] and len(server.requests) == 1 and report == {"HTTP 401": 1, "given up": 1}
    with pytest.raises(EndpointError, match="no connection"):
        Endpoint("http://127.0.0.1:9", "model", timeout=0.5)("x")


@pytest.fixture
def chat_folder(tmp_path) -> Path:
    """A chat model of transformers, of random weights: it answers, but nonsense."""
    characters = sorted({chr(c) for c in range(32, 127)} | {"\n"})
    tokenizer = Tokenizer(WordLevel({c: i for i, c in enumerate([*characters, "<end>"])}, unk_token=" "))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(tmp_path / "chat")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), max_position_embeddings=4096, **sizes)).save_pretrained(
        tmp_path / "chat"
    )
    return tmp_path / "chat"


def test_a_chat_model_of_transformers_is_asked_within_bounds(chat_folder, tmp_path):
    ask = ChatModel(str(chat_folder))
    answer, usage = ask("Say: make it red")
    assert isinstance(answer, str) and 1 <= usage["completion_tokens"] <= 2 * 120  # spaces are put between
    assert usage["prompt_tokens"] >= len("Say: make it red")
    writer = Writer(ask, tmp_path / "answers.jsonl", attempts=2, first_wait=0)
    assert list(writer.write([("a red star", "a blue star")], workers=1)) == [None]  # nonsense is not taken
    assert writer.report["given up"] == 1 and writer.report["completion_tokens"] > 0
    assert sum(n for name, n in writer.report.items() if name.startswith("unusable answer")) == 2
