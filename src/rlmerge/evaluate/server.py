"""Generation by a server that speaks OpenAI's API (llama.cpp, vLLM, SGLang, TGI, OpenAI): several requests at a time.

Raw prompts go to /completions, chats to /chat/completions: the server tokenizes and applies its model's chat template.
Servers fill in what a request leaves open (llama.cpp: the 40 best tokens, min-p 0.05), so everything that changes the
distribution is sent, also what OpenAI's own API does not know; where a server refuses such a key, it is left out, once
and for all, and that is noted.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

import requests

from rlmerge.errors import RlmergeError
from rlmerge.evaluate.backend import Asked, Completion, Sampling

EXTRAS = ("top_k", "min_p")
"""Keys beyond OpenAI's API that are sent: without them llama.cpp and vLLM sample from less than the distribution."""
STOPS = 4
"""Stop strings that OpenAI's API takes; further ones are looked for here."""
ATTEMPTS = 4
BUSY = frozenset({408, 409, 429, 500, 502, 503, 504})


class ServerError(RlmergeError):
    """A server that cannot be reached, refuses a request, or answers something else than was asked."""


class ServerBackend:
    """Completions of one model of a server.

    url        its address up to the version: http://localhost:8080/v1
    model      the model's name there
    parallel   requests under way at once
    key        sent as a bearer token, if given
    timeout    seconds for one answer
    """

    def __init__(self, url: str, model: str, parallel: int = 8, key: str = "", timeout: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.parallel = parallel
        self.timeout = timeout
        self.notes: list[str] = []
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._extras = list(EXTRAS)
        self._local = threading.local()
        self._lock = threading.Lock()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the samples beside the sampling, for the results file."""
        return {"kind": "server", "model": self.model}

    def check(self) -> None:
        """Raises ServerError if nothing answers there, or if it has no such model."""
        found = self._send("GET", "/models", None)
        names = [str(entry.get("id")) for entry in found.get("data", []) if isinstance(entry, dict)]
        # llama.cpp serves one model whatever the name; everybody else answers 404 later than this
        if names and self.model not in names and len(names) > 1:
            raise ServerError(f"{self.url}: has no model {self.model!r}. It has: {', '.join(sorted(names)[:10])}.")

    def run(self, asked: Iterable[Asked], sampling: Sampling) -> Iterator[Completion]:
        """Samples in the order in which they are finished. Raises ServerError."""
        waiting = iter(asked)
        pending: set[Future[Completion]] = set()
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="rlmerge-server") as pool:
            try:
                while True:
                    for one in waiting:
                        pending.add(pool.submit(self._complete, one, sampling))
                        if len(pending) >= 2 * self.parallel:
                            break
                    if not pending:
                        return
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
            finally:
                for future in pending:
                    future.cancel()

    def _complete(self, one: Asked, sampling: Sampling) -> Completion:
        chat = bool(one.problem.messages)
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": one.seed % 2**31,
            "stream": False,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop[:STOPS])
        body["messages" if chat else "prompt"] = list(one.problem.messages) if chat else one.problem.prompt
        found = self._post("/chat/completions" if chat else "/completions", body, sampling)
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
            finish = choice["finish_reason"]
            count = int((found.get("usage") or {}).get("completion_tokens", 0))
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerError(f"{self.url}: answered {str(found)[:200]!r}, which is no completion.") from None
        text = "" if text is None else str(text)
        cuts = [text.index(stop) for stop in sampling.stop if stop in text]
        if cuts:
            text = text[: min(cuts)]
        ended = bool(cuts) or finish != "length"
        return Completion(one.key, count, text, "stop" if ended else "length")

    def _post(self, path: str, body: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        """Sends a request with the extras that the server takes."""
        values = {"top_k": sampling.top_k or -1, "min_p": 0.0}
        while True:
            with self._lock:
                extras = tuple(self._extras)
            try:
                return self._send("POST", path, body | {key: values[key] for key in extras})
            except _RefusedError as refusal:
                named = [key for key in extras if key in str(refusal)]
                if not named:
                    raise ServerError(str(refusal)) from None
                with self._lock:
                    for key in named:
                        if key in self._extras:
                            self._extras.remove(key)
                            self.notes.append(f"{self.url} does not take {key!r}: its own default holds.")

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One request, again after a pause where the server is busy or the connection broke."""
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(2**attempt * (0.5 + random.random() / 2))
            try:
                answer = self._session().request(
                    method, self.url + path, json=body, headers=self._headers, timeout=(10.0, self.timeout)
                )
            except requests.RequestException as error:
                problem = f"{type(error).__name__}: {error}"
                if attempt == 0 and isinstance(error, requests.ConnectionError) and method == "GET":
                    break  # nobody is there: a first look need not insist
                continue
            if answer.status_code == 200:
                try:
                    found = answer.json()
                except ValueError:
                    found = None
                if not isinstance(found, dict):
                    raise ServerError(f"{self.url}{path}: answered {answer.text[:200]!r}, which is no JSON object.")
                return found
            problem = f"{answer.status_code} {answer.text[:300].strip()}"
            if answer.status_code not in BUSY:
                raise _RefusedError(f"{self.url}{path}: refused: {problem}")
        raise ServerError(
            f"{self.url}{path}: no answer ({problem[:300]}). Is the server running, and is this its address, with its "
            "version (http://localhost:8080/v1)? What is done is kept; the same command continues."
        )

    def _session(self) -> requests.Session:
        """A connection of this thread's own."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            # an address was asked for: proxies of the environment stay out of it
            self._local.session.trust_env = not _is_local(self.url)
        return self._local.session


class _RefusedError(ServerError):
    """The server understood and said no."""


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
