"""Fetches a model of the Hugging Face hub into the cache that its libraries share: only if asked, only what is needed.

A download that was cut off, by the network or by a kill, is continued where it stopped, and the bytes are compared with
the hub's SHA-256. Headers can be had without the weights. Needs the extra `hub`; the requests are huggingface_hub's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlmerge.checkpoint import hub
from rlmerge.checkpoint.copied import NOT_COPIED_FOLDER, is_weight_file
from rlmerge.checkpoint.folder import DELTA, read_json_object
from rlmerge.checkpoint.header import MAX_HEADER_BYTES
from rlmerge.errors import DownloadError, MissingExtraError
from rlmerge.version import VERSION

FIRST = 100_000
"""Bytes of a file that are asked for first: most headers are shorter."""
EVERY = 10.0
"""Seconds between two messages about one file."""
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class _File:
    """A file of a model on the hub: its size in bytes, and the SHA-256 that the hub has of large files, else ''."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class _Model:
    repository: str
    commit: str
    home: Path

    @property
    def snapshot(self) -> Path:
        return self.home / "snapshots" / self.commit

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit[:12]}"


def download(
    repository: str, revision: str | None = None, *, headers: bool = False, small: bool = False,
    tell: Tell = lambda text: None,
) -> Path:  # fmt: skip
    """The folder of a model in the cache, with every file that a merge or an evaluation reads; network where it lacks.

    headers   weights that are not there are left away: the folder, another one, then has holes in their place
              (`hub.has_headers_only`). Adapters, packs and small files are always fetched whole.
    small     only small files: no weights, and none need be there
    Pickles, GGUF and copies in other formats are never fetched. Raises DownloadError, MissingExtraError.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtraError("--download", "huggingface_hub", "hub") from None
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"{repository}: --download asks for the network, and HF_HUB_OFFLINE=1 forbids it. Leave out one of them; "
            "without --download what is in the cache is used."
        )
    with _explained(repository, revision), _no_bars():
        model, files = _look_up(repository, revision, small)
        _link_small(model, [file for file in files if not file.name.endswith(".safetensors")])
        if small:
            _note_revision(model, revision or "main")
            return model.snapshot
        wanted = _weights(model.snapshot, [file for file in files if file.name.endswith(".safetensors")])
        missing = [file for file in wanted if not (model.snapshot / file.name).exists()]
        if headers and any(_is_large(file.name) for file in missing):
            return _stand_in(model, files, wanted, tell)
        for number, file in enumerate(missing, 1):
            _fetch(model, file, f"{number} of {len(missing)}", tell)
        _note_revision(model, revision or "main")
        return model.snapshot


# ---- What there is ------------------------------------------------------------------------------------------------


def _look_up(repository: str, revision: str | None, small: bool) -> tuple[_Model, list[_File]]:
    """The commit that a revision means now, and the files there that anybody may want; weights, unless `small`."""
    from huggingface_hub import HfApi

    info = HfApi(library_name="rlmerge", library_version=VERSION).model_info(
        repository, revision=revision, files_metadata=True
    )
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise DownloadError(f"{repository}: the hub does not say which commit {revision or 'main'} is.")
    there = info.siblings or ()
    # a folder with weights is another model, and its small files without them would pass for this one's
    others = {name.split("/")[0] for entry in there if "/" in (name := entry.rfilename) and is_weight_file(name)}
    files = [
        _File(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else "")
        for entry in there
        if _is_wanted(entry.rfilename) and entry.rfilename.split("/")[0] not in others
    ]
    if small and not files:
        raise DownloadError(f"{repository}: holds nothing that a merge reads.")
    if not small and not any(file.name.endswith(".safetensors") for file in files):
        pickles = sorted(name for entry in there if is_weight_file(name := entry.rfilename))
        found = f"only {pickles[0]}" if pickles else "no weights"
        raise DownloadError(
            f"{repository}: has no safetensors ({found}), and nothing else is fetched for a merge. If these are "
            "pickles: fetch them yourself ('hf download'), and make safetensors of them (rlmerge convert)."
        )
    return _Model(repository, info.sha, hub.repository_folder(hub.cache_folder(), repository)), files


def _is_wanted(name: str) -> bool:
    """Safetensors at the top, small files anywhere but in hidden folders; nothing that leaves its folder."""
    parts = name.split("/")
    if any(map(NOT_COPIED_FOLDER.fullmatch, parts[:-1])):
        return False
    if any(part.startswith(".") or not part for part in parts) or "\\" in name or not name.isprintable():
        return False
    if name.endswith((".safetensors", ".safetensors.index.json")):
        return len(parts) == 1
    return not is_weight_file(name) and not name.endswith(".index.json")


def _weights(snapshot: Path, files: list[_File]) -> list[_File]:
    """The safetensors files that make the model: those of its indexes, where it has some."""
    placed: set[Any] = set()
    for index in snapshot.glob("*.safetensors.index.json"):
        weight_map = read_json_object(index).get("weight_map")
        placed |= set(weight_map.values()) if isinstance(weight_map, dict) else set()
    single = {"model.safetensors", "adapter_model.safetensors", "fisher.safetensors", DELTA}
    chosen = [file for file in files if file.name in placed | single]
    return chosen or files


def _is_large(name: str) -> bool:
    """Whether a file holds a whole model, of which the header says most; adapters and packs are looked into."""
    return not name.startswith("adapter_model") and name != DELTA


# ---- Fetching -----------------------------------------------------------------------------------------------------


def _link_small(model: _Model, files: list[_File]) -> None:
    from huggingface_hub import hf_hub_download

    for file in files:
        if not (model.snapshot / file.name).exists():
            hf_hub_download(model.repository, file.name, revision=model.commit, cache_dir=model.home.parent)


def _fetch(model: _Model, file: _File, number: str, tell: Tell) -> None:
    """One file of weights: into the cache's blobs, continued if a part is there, then linked by huggingface_hub."""
    from huggingface_hub import hf_hub_download

    if _HASH.fullmatch(file.sha256):
        blob = model.home / "blobs" / file.sha256
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = blob.with_name(f"{blob.name}.rlmerge.incomplete")
        with part.open("ab") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)  # another process may be at it: then there is nothing left to do
            if not blob.exists():
                _continue(model, file, opened, number, tell)
                os.replace(part, blob)
            else:
                part.unlink(missing_ok=True)
    hf_hub_download(model.repository, file.name, revision=model.commit, cache_dir=model.home.parent)


def _continue(model: _Model, file: _File, opened: IO[bytes], number: str, tell: Tell) -> None:
    """Appends what is missing of a file. Raises DownloadError for bytes that are not those of the hub's hash."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    have = os.fstat(opened.fileno()).st_size
    if have > file.size:
        opened.truncate(0)
        have = 0
    _check_space(model.home, file.size - have)
    what = f"{model}: {file.name} ({number})"
    tell(f"{what}: {_size(file.size)}" + (f", continued after {_size(have)}" if have else ""))
    url = hf_hub_url(model.repository, file.name, revision=model.commit)
    target: Any = _Told(opened, file.size, what, tell)
    headers = build_hf_headers(library_name="rlmerge", library_version=VERSION)
    http_get(url, target, resume_size=have, headers=headers, expected_size=file.size)
    opened.flush()
    with open(opened.name, "rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != file.sha256:
        opened.truncate(0)
        raise DownloadError(
            f"{model}: {file.name} arrived with SHA-256 {found}, and the hub says {file.sha256}: it was damaged on the "
            "way. The same command fetches it again."
        )


class _Told:
    """A file that says from time to time how much of it there is; what `http_get` needs of one."""

    def __init__(self, opened: IO[bytes], size: int, what: str, tell: Tell) -> None:
        self._opened, self._size, self._what, self._tell = opened, size, what, tell
        self._last = time.monotonic()
        self.seek, self.tell, self.truncate, self.flush = opened.seek, opened.tell, opened.truncate, opened.flush

    def write(self, data: bytes) -> int:
        if time.monotonic() - self._last > EVERY:
            self._last = time.monotonic()
            self._tell(f"{self._what}: {_size(self._opened.tell())} of {_size(self._size)}")
        count = self._opened.write(data)
        self._opened.flush()  # a kill loses nothing that arrived
        return count


def _check_space(home: Path, needed: int) -> None:
    free = shutil.disk_usage(home).free
    if needed > free:
        raise DownloadError(
            f"{home}: {_size(needed)} are still to come and {_size(free)} are free. Make room, or set "
            "HF_HUB_CACHE to a folder on another disk."
        )


def _note_revision(model: _Model, revision: str) -> None:
    """Writes down which commit a branch or tag means, as the cache's other users do; a commit needs no note."""
    if revision == model.commit:
        return
    note = model.home / "refs" / revision
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(f".{note.name}.{os.getpid()}")
    fresh.write_text(model.commit)
    os.replace(fresh, note)


# ---- Headers ------------------------------------------------------------------------------------------------------


def _stand_in(model: _Model, files: list[_File], weights: list[_File], tell: Tell) -> Path:
    """A folder like the snapshot, in which files of weights are their headers and then holes of the right size."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlmerge" / "headers"
    folder = hub.repository_folder(home, model.repository) / "snapshots" / model.commit
    if folder.is_dir():
        return folder
    total = sum(file.size for file in weights)
    tell(f"{model}: headers of {len(weights)} file(s); {_size(total)} of weights are left where they are")
    fresh = folder.with_name(f".{model.commit}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        for file in weights:
            with (fresh / file.name).open("wb") as opened:
                opened.write(_header(model, file))
                opened.truncate(file.size)
        for file in files:
            if not file.name.endswith(".safetensors"):
                (fresh / file.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(model.snapshot / file.name, fresh / file.name)
        (fresh / hub.MARK).write_text("headers of a model on the hub, and no weights\n")
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _header(model: _Model, file: _File) -> bytes:
    """The header of a safetensors file with its length field; whatever is wrong with it, its reader will say."""
    raw = _range(model, file, 0, min(FIRST, file.size))
    stop = min(8 + int.from_bytes(raw[:8], "little"), file.size, 8 + MAX_HEADER_BYTES)
    return (raw + _range(model, file, len(raw), stop))[: max(stop, 8)] if stop > len(raw) else raw[: max(stop, 8)]


def _range(model: _Model, file: _File, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, also from a server that sends all of it."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(model.repository, file.name, revision=model.commit)
    headers = build_hf_headers(library_name="rlmerge", library_version=VERSION)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        skipped = start if response.status_code == 200 else 0
        found = bytearray()
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= skipped + stop - start:
                break
    return bytes(found[skipped : skipped + stop - start])


# ---- Errors -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Makes a DownloadError of what the hub or the network refuses."""
    from huggingface_hub import errors

    named = f"{repository}@{revision}" if revision else repository
    page = f"https://huggingface.co/{repository}"
    try:
        yield
    except errors.GatedRepoError:
        raise DownloadError(
            f"{named}: is gated. Accept its conditions at {page}, then say who you are: 'hf auth login', or HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{named}: this model has no such revision. Its branches and tags: {page}/tree") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"{named}: the hub shows no such model. If it is a folder, it does not exist; if it is a private model, "
            "say who you are: 'hf auth login', or HF_TOKEN."
        ) from None
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.FileMetadataError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the hub answers {status}" if status else f"{type(error).__name__}: {str(error)[:300]}"
        raise DownloadError(
            f"{named}: cannot be fetched ({reason}). What has arrived is kept; the same command continues."
        ) from None
    except OSError as error:
        raise DownloadError(
            f"{named}: cannot be fetched: {error.strerror or error}. What has arrived is kept; the same command "
            "continues."
        ) from error
    except ValueError as error:  # an id or a revision that the hub's library refuses
        raise DownloadError(f"{named}: cannot be fetched: {error}") from None


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """huggingface_hub draws no bars: progress is told in words."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an environment variable may have the last word
        disable_progress_bars()
        try:
            yield
        finally:
            if not before:
                enable_progress_bars()


def _size(count: int) -> str:
    unit = next((unit for unit in (9, 6, 3) if count >= 10**unit), 0)
    return f"{count / 10**unit:.3g} {' kMG'[unit // 3].strip()}B"
