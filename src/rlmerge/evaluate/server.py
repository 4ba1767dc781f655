"""Generation by a server that speaks OpenAI's API (llama.cpp, vLLM, SGLang, TGI, OpenAI): several requests at a time.

Raw prompts go to /completions, chats to /chat/completions: the server tokenizes and applies its model's chat template.
Servers fill in what a request leaves open (llama.cpp: the 40 best tokens, min-p 0.05), so what most of them cut the
distribution with is sent, also where OpenAI's own API does not know it; where a server refuses such a key, it is left
out from then on, and that is noted. Penalties are left to the server.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from rlmerge.errors import RlmergeError
from rlmerge.evaluate.backend import Asked, Completion, Sampling

STOPS = 4
"""Stop strings that OpenAI's API takes; further ones are looked for here."""
ATTEMPTS = 4
BUSY = frozenset({408, 409, 429, 500, 502, 503, 504})
HOPELESS = (
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidHeader,
)


class ServerError(RlmergeError):
    """A server that cannot be reached, refuses a request, or answers something else than was asked."""


class _RefusedError(ServerError):
    """The server understood and said no."""


class ServerBackend:
    """Completions of one model of a server.

    url        its address up to the version: http://localhost:8080/v1
    model      the model's name there
    parallel   requests under way at once
    key        sent as a bearer token, if given
    timeout    seconds for one answer
    Raises ServerError for an address or a key that are none.
    """

    def __init__(self, url: str, model: str, parallel: int = 8, key: str = "", timeout: float = 600.0) -> None:
        self.url = _checked(url)
        self.model = model
        self.parallel = parallel
        self.timeout = timeout
        self.notes: list[str] = []
        key = key.strip()
        if not key.isascii() or not (key.isprintable()):
            raise ServerError("the server's key has characters that no header can carry.")
        self._auth = _Bearer(key)
        self._refused: set[str] = set()
        self._served: dict[str, Any] = {}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the samples beside the sampling, for the results file."""
        return {"kind": "server", "model": self.model}

    @property
    def identity(self) -> str:
        """What the server says of the model, once `check` has asked; '' before."""
        told = {key: self._served[key] for key in ("id", "root", "meta") if self._served.get(key)}
        return json.dumps(told, sort_keys=True) if told else ""

    def check(self) -> None:
        """Raises ServerError if nothing answers there, or if it has several models and not this one."""
        found = self._send("GET", "/models", None, insist=False)
        entries = [entry for entry in found.get("data") or [] if isinstance(entry, dict) and "id" in entry]
        mine = [entry for entry in entries if entry["id"] == self.model]
        if not mine and len(entries) > 1:
            names = ", ".join(sorted(str(entry["id"]) for entry in entries)[:10])
            raise ServerError(f"{self.url}: has no model {self.model!r}. It has: {names}.")
        if not mine and entries:
            # llama.cpp serves its one model whatever the name
            self.notes.append(f"{self.url} serves {entries[0]['id']!r}, not {self.model!r}: that one answers.")
        self._served = (mine or entries or [{}])[0]

    def run(self, asked: Iterable[Asked], sampling: Sampling) -> Iterator[Completion]:
        """Completions in the order in which they are finished. Raises ServerError, after what was finished before."""
        waiting, done = iter(asked), queue.SimpleQueue()
        self._stop.clear()

        def work() -> None:
            while not self._stop.is_set():
                with self._lock:
                    one = next(waiting, None)
                if one is None:
                    break
                try:
                    done.put(self._complete(one, sampling))
                except BaseException as error:
                    done.put(error)
                    self._stop.set()
            done.put(None)

        # daemons: an interrupted run does not wait for answers that are under way
        workers = [threading.Thread(target=work, daemon=True, name=f"rlmerge-server-{n}") for n in range(self.parallel)]
        for worker in workers:
            worker.start()
        left, failure = len(workers), None
        try:
            while left:
                found = done.get()
                if found is None:
                    left -= 1
                elif isinstance(found, Completion):
                    yield found
                else:
                    failure = failure or found
            if failure is not None:
                raise failure
        finally:
            self._stop.set()

    def _complete(self, one: Asked, sampling: Sampling) -> Completion:
        chat = bool(one.problem.messages)
        stops = (*sampling.stop, *one.stop)
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": one.seed % 2**31,
            "stream": False,
        }
        if stops:
            body["stop"] = list(stops[:STOPS])
        body["messages" if chat else "prompt"] = list(one.problem.messages) if chat else one.problem.prompt
        found = self._post("/chat/completions" if chat else "/completions", body, sampling)
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
            finish = choice["finish_reason"]
            count = int((found.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerError(f"{self.url}: answered {str(found)[:200]!r}, which is no completion.") from None
        text = "" if text is None else str(text)
        cuts = [text.index(stop) for stop in stops if stop in text]
        return Completion(one.key, count, text[: min(cuts)] if cuts else text, "stop" if cuts else str(finish))

    def _post(self, path: str, body: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        """Sends a request with the keys beyond OpenAI's API that the server takes."""
        extras = {"top_k": sampling.top_k or -1, "min_p": 0.0}
        extras = {key: value for key, value in extras.items() if key not in self._refused}
        try:
            return self._send("POST", path, body | extras)
        except _RefusedError as refusal:
            named = {key for key in extras if key in str(refusal)}
            if not named or ("top_k" in named and sampling.top_k):
                raise
            # only if the rest is taken were these to blame: some servers repeat the whole request in a refusal
            found = self._post_without(path, body, extras, named, refusal)
            with self._lock:
                for key in sorted(named - self._refused):
                    self.notes.append(f"{self.url} does not take {key!r}: its own default holds.")
                self._refused |= named
            return found

    def _post_without(
        self, path: str, body: dict[str, Any], extras: dict[str, Any], named: set[str], refusal: ServerError
    ) -> dict[str, Any]:
        left = {key: value for key, value in extras.items() if key not in named}
        try:
            return self._send("POST", path, body | left)
        except _RefusedError as again:
            more = {key for key in left if key in str(again)}
            if not more:
                raise refusal from None
            named |= more
            return self._post_without(path, body, left, more, refusal)

    def _send(self, method: str, path: str, body: dict[str, Any] | None, insist: bool = True) -> dict[str, Any]:
        """One request, again after a pause where the server is busy or the connection broke."""
        problem = ""
        for attempt in range(ATTEMPTS if insist else 1):
            if attempt and self._stop.wait(_pause(attempt)):
                break
            try:
                answer = self._session().request(
                    method, self.url + path, json=body, timeout=(10.0, self.timeout if insist else 10.0)
                )
            except HOPELESS as error:
                raise ServerError(f"{self.url}{path}: {error}") from None
            except requests.RequestException as error:
                problem = f"{type(error).__name__}: {error}"
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
                hint = " Does the address end in its version, such as /v1?" if answer.status_code == 404 else ""
                raise _RefusedError(f"{self.url}{path}: refused: {problem}{hint}")
        raise ServerError(
            f"{self.url}{path}: no answer ({problem[:300]}). Is the server running, and is this its address, with its "
            "version (http://localhost:8080/v1)? What is done is kept; the same command continues."
        )

    def _session(self) -> requests.Session:
        """A connection of this thread's own."""
        if not hasattr(self._local, "session"):
            session = self._local.session = requests.Session()
            session.auth = self._auth  # ours, and not what a .netrc says
            # an address of this machine was asked for: proxies of the environment stay out of it
            host = urlsplit(self.url).hostname or ""
            session.trust_env = not (host in ("localhost", "::1") or host.startswith("127."))
        return self._local.session


class _Bearer(AuthBase):
    """Sends the key as a bearer token, or nothing."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _pause(attempt: int) -> float:
    """Seconds before another attempt."""
    return 2.0**attempt


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise ServerError(f"--url {url!r}: is no address; write one such as http://localhost:8080/v1.")
    return url.rstrip("/")
