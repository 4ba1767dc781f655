"""Completions from a server: a real llama.cpp where its wheel and a model are, and what a server can do wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command_line import refused, rlmerge, succeeded

pytest.importorskip("requests")

from rlmerge.evaluate import server as module
from rlmerge.evaluate.backend import Asked, Sampling
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.results import Results
from rlmerge.evaluate.server import ServerBackend, ServerError

GGUF = Path(".venv/smollm2.gguf")
FOLDER = Path(".venv/smollm2")


@contextmanager
def answering(answer: Any) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A server whose answers are those of `answer(path, body)`: (status, JSON or text). Yields URL and requests."""
    seen: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else {}
            seen.append((self.path, body | {"authorization": self.headers.get("Authorization")}))
            status, found = answer(self.path, body)
            data = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", seen
    finally:
        http.shutdown()
        http.server_close()


def completion(text: str, finish: str = "stop", tokens: int = 3) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish}], "usage": {"completion_tokens": tokens}}


def asked(count: int = 1, messages: bool = False) -> list[Asked]:
    chat = ({"role": "user", "content": "hello"},)
    return [
        Asked(
            number, Problem(str(number), messages=chat) if messages else Problem(str(number), f"{number} ="), 2**63 + 5
        )
        for number in range(count)
    ]


def test_what_is_sent_and_what_comes_back() -> None:
    with answering(lambda *_: (200, completion(" 4\nmore", tokens=5))) as (url, seen):
        backend = ServerBackend(url, "m", key="secret")
        sampling = Sampling(0.7, 12, 0.9, stop=("\n", "b", "c", "d", "e"))
        found = list(backend.run(asked(), sampling))
    assert [(one.key, one.text, one.tokens, one.finish) for one in found] == [(0, " 4", 5, "stop")]
    path, body = seen[0]
    assert path == "/v1/completions"
    assert body["authorization"] == "Bearer secret"
    assert body["prompt"] == "0 ="
    assert (body["temperature"], body["max_tokens"], body["top_p"]) == (0.7, 12, 0.9)
    assert body["stop"] == ["\n", "b", "c", "d"]
    assert 0 <= body["seed"] < 2**31
    assert (body["top_k"], body["min_p"]) == (-1, 0.0)


def test_chats_go_to_the_chat_address_and_may_be_cut_off() -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}

    with answering(answer) as (url, seen):
        found = list(ServerBackend(url, "m").run(asked(messages=True), Sampling()))
    assert seen[0][0] == "/v1/chat/completions"
    assert seen[0][1]["messages"] == [{"role": "user", "content": "hello"}]
    assert [(one.text, one.tokens, one.finish) for one in found] == [("", 0, "length")]


def test_keys_that_a_server_does_not_know_are_left_out_once_and_for_all() -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        for key in ("top_k", "min_p"):
            if key in body:
                return 400, {"error": {"message": f"Unrecognized request argument supplied: {key}"}}
        return 200, completion(body["prompt"])

    with answering(answer) as (url, seen):
        backend = ServerBackend(url, "m", parallel=1)
        assert [one.text for one in backend.run(asked(3), Sampling())] == ["0 =", "1 =", "2 ="]
        assert len(seen) == 5
        assert len(backend.notes) == 2


def test_a_refusal_that_repeats_the_request_blames_nobody() -> None:
    """FastAPI's servers do: the keys stand in it, but leaving them out does not help."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 422, {"detail": [{"msg": "seed is too large", "input": body}]}

    with answering(answer) as (url, _):
        backend = ServerBackend(url, "m", parallel=1)
        with pytest.raises(ServerError, match="seed is too large"):
            list(backend.run(asked(), Sampling()))
        assert backend.notes == []


def test_a_top_k_that_was_asked_for_is_not_left_out() -> None:
    refusal = (400, {"error": {"message": "unknown argument: top_k"}})
    with (
        answering(lambda path, body: refusal if "top_k" in body else (200, completion("x"))) as (url, _),
        pytest.raises(ServerError, match="top_k"),
    ):
        list(ServerBackend(url, "m").run(asked(), Sampling(1.0, top_k=5)))


def test_what_was_answered_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command: the server dies after five answers; started again, it is asked for the rest only."""
    monkeypatch.setattr(module, "_pause", lambda _: 0.0)
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(f'{{"prompt": "{n} =", "answer": "4", "verifier": "exact"}}\n' for n in range(12)))
    count = [0]

    def dying(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if not body:
            return 200, {"data": [{"id": "m"}]}
        count[0] += 1
        return (200, completion("4")) if count[0] <= 5 else (500, "out of memory")

    options = ("--task", problems, "-o", tmp_path / "out", "--backend", "server", "--parallel", 1)
    with answering(dying) as (url, _):
        assert "out of memory" in refused_after_progress(rlmerge("eval", "m", *options, "--url", url))
    file = next((tmp_path / "out").glob("*.jsonl"))
    assert len(list(Results.load(file))) == 5
    models = {"data": [{"id": "m"}]}
    with answering(lambda path, body: (200, completion("4") if body else models)) as (url, seen):
        found = succeeded(rlmerge("eval", "m", *options, "--url", url, "--json", "--quiet")).json
        assert (found[0]["problems"], found[0]["accuracy"]) == (12, 1.0)
        assert len(seen) == 8
    with answering(lambda path, body: (200, completion("4") if body else {"data": [{"id": "another"}]})) as (url, _):
        assert "holds the results of another run" in refused(rlmerge("eval", "m", *options, "--url", url))


def refused_after_progress(done: Any) -> str:
    assert done.code == 2
    assert "Traceback" not in done.err
    return done.err


@pytest.mark.parametrize("url", ["localhost:8080/v1", "http://", "ftp://x/v1", "http://[::1/v1", "http://x:99999/v1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ServerError, match="is no address"):
        ServerBackend(url, "m")


def test_the_key_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not into a message, and a .netrc does not take its place."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login bob password x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with answering(lambda *_: (200, completion("x"))) as (url, seen):
        list(ServerBackend(url, "m", key="secret\r\n").run(asked(), Sampling()))
        list(ServerBackend(url, "m").run(asked(), Sampling()))
    assert [body["authorization"] for _, body in seen] == ["Bearer secret", None]
    with pytest.raises(ServerError) as caught:
        ServerBackend(url, "m", key="sec\nret")
    assert "sec" not in str(caught.value).replace("server", "")


def test_an_ended_run_waits_for_no_answer() -> None:
    """Whoever stops listening does not wait for what is under way."""
    slow = threading.Event()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body["prompt"] != "0 =":
            slow.wait(20)
        return 200, completion("x")

    with answering(answer) as (url, _):
        run = ServerBackend(url, "m", parallel=3).run(asked(9), Sampling())
        assert next(run).key == 0
        began = time.monotonic()
        run.close()
        assert time.monotonic() - began < 5
        slow.set()


def test_every_answer_comes_once_whatever_their_order() -> None:
    with answering(lambda path, body: (200, completion(body["prompt"]))) as (url, seen):
        found = list(ServerBackend(url, "m", parallel=5).run(asked(60), Sampling()))
    assert sorted(one.key for one in found) == list(range(60))
    assert all(one.text == f"{one.key} =" for one in found)
    assert len(seen) == 60


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_pause", lambda _: 0.0)
    left = [503, 429, 500]

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (left.pop(), "busy") if left else (200, completion("done"))

    with answering(answer) as (url, _):
        assert [one.text for one in ServerBackend(url, "m").run(asked(), Sampling())] == ["done"]
    with answering(lambda *_: (503, "loading model")) as (url, seen):
        with pytest.raises(ServerError, match="loading model"):
            list(ServerBackend(url, "m").run(asked(), Sampling()))
        assert len(seen) == module.ATTEMPTS


@pytest.mark.parametrize(
    ("status", "found", "word"),
    [
        (404, {"error": {"message": "model 'm' does not exist"}}, "does not exist"),
        (401, "no key", "no key"),
        (200, "<html>", "no JSON object"),
        (200, [], "no JSON object"),
        (200, {"choices": []}, "no completion"),
        (200, {"choices": [{"text": "a"}]}, "no completion"),
        (200, {"error": "context size exceeded"}, "context size exceeded"),
    ],
)
def test_wrong_answers_are_errors_that_show_them(status: int, found: Any, word: str) -> None:
    with answering(lambda *_: (status, found)) as (url, _), pytest.raises(ServerError, match=word):
        list(ServerBackend(url, "m").run(asked(20), Sampling()))


def test_nobody_there_and_no_such_model() -> None:
    with pytest.raises(ServerError, match="Is the server running"):
        ServerBackend("http://127.0.0.1:9/v1", "m").check()
    with answering(lambda *_: (200, {"data": None})) as (url, _):
        ServerBackend(url, "m").check()
    with answering(lambda *_: (200, {"data": [{"id": "other", "meta": {"n_params": 1}}]})) as (url, _):
        backend = ServerBackend(url, "m")
        backend.check()
        assert "serves 'other', not 'm'" in backend.notes[0]
        assert "n_params" in backend.identity
    with answering(lambda *_: (200, {"data": [{"id": "a"}, {"id": "b"}]})) as (url, _):
        ServerBackend(url, "b").check()
        with pytest.raises(ServerError, match="It has: a, b"):
            ServerBackend(url, "c").check()


def test_the_command(tmp_path: Path) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"prompt": "2 + 2 =", "answer": "4", "verifier": "exact"}\n')
    with answering(lambda path, body: (200, completion("4") if body else {"data": []})) as (url, _):
        options = ("--backend", "server", "--url", url, "-o", tmp_path / "out", "--task", problems, "--json")
        found = succeeded(rlmerge("eval", "m", *options)).json
        assert found[0]["accuracy"] == 1.0
        assert Results.load(found[0]["results"]).header.settings["backend"] == {"kind": "server", "model": "m"}
        message = refused(rlmerge("eval", "m", *options, "--key-env", "RLMERGE_NO_SUCH_VARIABLE"))
        assert "RLMERGE_NO_SUCH_VARIABLE" in message
    assert "belong together" in refused(rlmerge("eval", "m", "--task", problems, "-o", tmp_path, "--url", "http://x"))


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    """llama.cpp's own server with SmolLM2, in this process; its address."""
    if not GGUF.exists():
        pytest.skip("the model is not here (make install brings it)")
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(GGUF)
    params.n_ctx, params.n_parallel, params.port = 2048, 2, 0
    params.cpuparams.n_threads = 2
    params.warmup = False
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


def test_a_real_llama_cpp(llama: str, tmp_path: Path) -> None:
    """Greedy answers, a chat, a stop string, a cut at the limit, seeds, and the whole command."""
    backend = ServerBackend(llama, "smollm2", parallel=2)
    backend.check()
    prompts = ["The capital of France is", "1 2 3 4 5 6 7", "def add(a, b):\n    return"]
    problems = [Problem(str(n), prompt) for n, prompt in enumerate(prompts)]
    problems.append(Problem("3", messages=({"role": "user", "content": "What is the capital of France?"},)))
    sampling = Sampling(0.0, 6)
    found = {one.key: one for one in backend.run([Asked(p.id, p, 1) for p in problems], sampling)}
    assert "Paris" in found["0"].text
    assert found["1"].text.startswith(" 8 9 1")
    assert found["2"].text.startswith(" a + b")
    assert found["3"].text
    assert {one.finish for one in found.values()} == {"length"}
    assert all(one.tokens == 6 for one in found.values())
    stopped = next(iter(backend.run([Asked("1", problems[1], 1)], Sampling(0.0, 20, stop=("10",)))))
    assert (stopped.text, stopped.finish) == (" 8 9 ", "stop")
    one, other, third = (
        [c.text for c in ServerBackend(llama, "m", parallel=1).run([Asked("0", problems[0], seed)], Sampling(1.5, 12))]
        for seed in (7, 7, 8)
    )
    assert one == other != third

    file = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "1 2 3 4 5 6 7", "answer": "8 9 10", "verifier": "exact", "meta": {"stop": [" 11"]}},
        {"prompt": "The capital of France is", "answer": "London", "verifier": "exact", "meta": {"stop": ["."]}},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--backend", "server", "--url", llama, "--task", file, "--max-new-tokens", 16, "-o", tmp_path / "out")
    found = succeeded(rlmerge("eval", "smollm2", *options, "--json")).json
    assert (found[0]["problems"], found[0]["accuracy"]) == (2, 0.5)


def test_the_same_model_in_transformers(llama: str) -> None:
    """Quantized blocks there, dequantized weights here: the first words agree where no two tokens are nearly equal."""
    if not FOLDER.exists():
        pytest.skip("the model is not here (make install brings it)")
    from rlmerge.evaluate.run import TransformersBackend, load_model

    local = TransformersBackend(*load_model(FOLDER))
    prompts = ["The capital of France is", "1 2 3 4 5 6 7", "def add(a, b):\n    return", "Water boils at"]
    ask = [Asked(n, Problem(str(n), prompt), 1) for n, prompt in enumerate(prompts)]
    here, there = ({c.key: c.text for c in b.run(ask, Sampling(0.0, 4))} for b in (local, ServerBackend(llama, "m")))
    assert sum(here[n] == there[n] for n in here) >= 3, (here, there)
