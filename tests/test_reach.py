"""A recipe from somewhere runs no code, and reads and writes no file but those it names: an audit of every open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command_line import good_set
from tests.faults.test_write_faults import STAGES

PROGRAM = """
import json, os, sys
import rlmerge, rlmerge.preflight, rlmerge.verification, rlmerge.staged_merge, rlmerge.checkpoint.vocabulary
import rlmerge.checkpoint.pack, yaml, threadpoolctl
from rlmerge.kernels import load_kernels

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        flags = arguments[2] or 0
        events.append([event, os.fsdecode(arguments[0]), bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))])
    elif event == "exec":
        events.append([event, arguments[0].co_filename, False])
    elif event.startswith(("os.", "shutil.", "subprocess.", "socket.", "pickle.", "ctypes.dlopen", "webbrowser.")):
        events.append([event, str(arguments[0]) if arguments else "", True])

load_kernels("numpy")
said, events = None, []
home, recipe, out = sys.argv[1:]
os.chdir(home)
sys.addaudithook(watch)
try:
    rlmerge.check(recipe, out=out, kernels="numpy")
    rlmerge.merge_to_folder(recipe, out, threads=1, kernels="numpy")
    rlmerge.verify(out)
except rlmerge.RlmergeError as error:
    said = str(error)
print(json.dumps([said, events]))
"""
CODE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
        "socket.getaddrinfo", "pickle.find_class", "webbrowser.open")  # fmt: skip
LISTING = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
OURS = (sys.prefix, sys.base_prefix, "/proc/", "/sys/", "/dev/null", "/usr/lib", "/lib")


def audited(home: Path, recipe: str, out: Path) -> tuple[str | None, list[list[Any]]]:
    """What check, merge and verify say (None: nothing wrong), and what they open."""
    return ended(started(home, recipe, out))


def started(home: Path, recipe: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(home), str(home / recipe), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[str | None, list[list[Any]]]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    said, events = json.loads(out)
    return said, events


def check_reach(events: list[list[Any]], home: Path, out: Path) -> None:
    """Reads below the home and Python's own folders, writes below OUT and its neighbours; nothing is run."""
    source = str(Path(sys.modules["rlmerge"].__file__ or "").parent)
    for event, path, writes in events:
        assert event not in CODE, (event, path)
        if event == "exec":  # modules that are imported late, and what dataclasses write
            assert path.startswith((source, *OURS, "<")), path
        # a name alone is one inside an open folder, see `safe_files`
        if event in LISTING or not os.path.isabs(path):
            continue
        if event == "open" and not writes:
            mine = path.startswith((f"{home}/", str(out), source, *OURS))
            assert mine or ("numba" in path or path.endswith((".py", ".pyc", ".so"))), path
        elif writes and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            assert path.startswith(str(out)) or path == "/dev/null", (event, path)


@pytest.fixture
def home(tmp_path) -> Path:
    home = tmp_path / "home"
    good_set(home)
    (home / "stages.yml").write_text(STAGES)
    (tmp_path / "secret.txt").write_text("TOPSECRET {{ key }}\n")
    (tmp_path / "secret.json").write_text('{"password": "TOPSECRET"}')
    return home


@pytest.mark.parametrize("recipe", ["recipe.yml", "stages.yml"])
def test_what_a_merge_opens(home, tmp_path, recipe):
    said, events = audited(home, recipe, tmp_path / "out")
    assert said is None
    assert len(events) > 50
    check_reach(events, home, tmp_path / "out")


TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: e0}, {model: e1}]\nparameters: {weight: 1}\n"


def link(name: str, target: str) -> Callable[[Path], str]:
    def spoil(home: Path) -> str:
        (home / name).unlink(missing_ok=True)
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).symlink_to(home.parent / target)
        return TIES

    return spoil


def auto(spoil: Callable[[Path], str]) -> Callable[[Path], str]:
    """The recipe asks for the most common chat template, or for all tokens."""
    return lambda home: spoil(home) + "chat_template: auto\ntokenizer_source: union\n"


def index(file: str) -> Callable[[Path], str]:
    def spoil(home: Path) -> str:
        path = home / "base" / "model.safetensors.index.json"
        said = json.loads(path.read_text())
        said["weight_map"]["model.norm.weight"] = file
        path.write_text(json.dumps(said))
        return TIES

    return spoil


def pipe(name: str) -> Callable[[Path], str]:
    def spoil(home: Path) -> str:
        (home / name).unlink(missing_ok=True)
        os.mkfifo(home / name)
        return TIES

    return spoil


OWNED = "['touch owned']"
HOSTILE: dict[str, tuple[Callable[[Path], str], str]] = {
    "a tag that runs a program": (
        lambda home: TIES + f"name: !!python/object/apply:os.system {OWNED}\n", "not allowed in a recipe"),
    "a tag that makes an object": (
        lambda home: TIES + "name: !!python/object/new:subprocess.Popen [[touch, owned]]\n", "not allowed in a recipe"),
    "a tag that imports": (lambda home: TIES + "name: !!python/module:antigravity\n", "not allowed in a recipe"),
    "a plugin": (lambda home: TIES + "plugin: evil.py\n", "plugin"),
    "a method from a file": (lambda home: TIES.replace("ties", "./evil.py"), "evil"),
    "aliases of aliases": (
        lambda home: "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")) + TIES, "more than"),
    "a stage that climbs": (lambda home: STAGES.replace("one", "../../climbed"), "climbed"),
    "an absolute stage": (lambda home: STAGES.replace("one", str(home.parent / "climbed")), "cannot be the folder"),
    "a template that is a path": (lambda home: TIES + f"chat_template: {home.parent / 'secret.txt'}\n", "template"),
    "an index that climbs": (index("../../secret.txt"), "secret.txt"),
    "an index of an absolute file": (index("/etc/passwd"), "/etc/passwd"),
    "a tokenizer that is a link": (link("base/tokenizer.json", "secret.json"), "is a link to"),
    "a configuration that is a link": (link("base/config.json", "secret.json"), "is a link to"),
    "a licence that is a link": (link("base/LICENSE", "secret.txt"), "is a link to"),
    "code that is a link": (link("base/modeling.py", "secret.txt"), "is a link to"),
    "a template of an expert that is a link": (auto(link("e0/chat_template.jinja", "secret.txt")), "is a link to"),
    "a second template that is a link": (
        auto(link("e1/additional_chat_templates/x.jinja", "secret.txt")), "is a link to"),
    "an expert's tokenizer that is a link": (auto(link("e1/tokenizer.json", "secret.json")), "is a link to"),
    "a pipe for a configuration": (pipe("e0/config.json"), "not a regular file"),
    "a pipe for an index": (pipe("base/model.safetensors.index.json"), "not a regular file"),
    "a pipe for weights": (pipe("e0/model.safetensors"), "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(home, tmp_path, case):
    """Refused in one message, with nothing run, and nothing of the secret read, written or said."""
    spoil, words = HOSTILE[case]
    (home / "evil.py").write_text("open('owned', 'w')\n")
    (home / "hostile.yml").write_text(spoil(home))
    before = sorted(os.listdir(tmp_path))
    said, events = audited(home, "hostile.yml", tmp_path / "out")
    assert said is not None
    assert words in said
    assert "TOPSECRET" not in said
    check_reach(events, home, tmp_path / "out")
    assert not [path for event, path, _ in events if event in ("open", "exec") and "evil" in path]
    assert sorted(os.listdir(tmp_path)) == before
    assert not list(tmp_path.rglob("owned"))


def test_a_card_that_is_a_link_and_one_that_is_a_pipe(home, tmp_path):
    """Nobody needs it: it is left alone."""
    (tmp_path / "secret.md").write_text("---\nlicense: TOPSECRET\n---\n")
    (home / "base" / "README.md").symlink_to(tmp_path / "secret.md")
    os.mkfifo(home / "e0" / "README.md")
    said, events = audited(home, "recipe.yml", tmp_path / "out")
    assert said is None
    check_reach(events, home, tmp_path / "out")
    assert b"TOPSECRET" not in b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())


def test_links_of_the_hubs_cache_and_within_a_model_are_followed(home, tmp_path):
    """Weights may lie anywhere, and small files in the cache of the hub or under another name in the same folder."""
    blobs = home / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    shutil.move(home / "base" / "tokenizer.json", blobs / "0a")
    (home / "base" / "tokenizer.json").symlink_to(blobs / "0a")
    (home / "base" / "LICENSE.txt").write_text("ours\n")
    (home / "base" / "LICENSE").symlink_to("LICENSE.txt")
    (home / "far").mkdir()
    shutil.move(home / "e0" / "model.safetensors", home / "far" / "weights")
    (home / "e0" / "model.safetensors").symlink_to(home / "far" / "weights")
    said, events = audited(home, "ties.yml", tmp_path / "out")
    assert said is None
    check_reach(events, home, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "ours\n"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_what_the_kernel_sees(home, tmp_path):
    """The real command, traced: every file that is made, renamed or removed is OUT's; no program, no connection."""
    trace = tmp_path / "trace"
    command = [sys.executable, "-m", "rlmerge.cli.main", "merge", str(home / "recipe.yml"), str(tmp_path / "out"),
               "--kernels", "numpy", "--quiet"]  # fmt: skip
    calls = "openat", "open", "creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat"
    calls = ",".join((*calls, "rmdir", "link", "linkat", "symlink", "symlinkat", "truncate", "execve", "connect"))
    done = subprocess.run(
        ["strace", "-f", "-y", "-qq", "-o", str(trace), "-e", f"trace={calls}", *command],
        capture_output=True, text=True, check=False, cwd=home, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    if done.returncode != 0 and "ptrace" in done.stderr.lower():
        pytest.skip("processes cannot be traced here")
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1)[1].strip() for line in trace.read_text().splitlines()]
    assert sum(line.startswith("execve(") for line in lines) == 1  # itself
    assert not [line for line in lines if line.startswith("connect(")]
    writing = [line for line in lines if any(word in line for word in ("O_WRONLY", "O_RDWR", "O_CREAT"))]
    writing += [
        line for line in lines if line.startswith(("mkdir", "rename", "unlink", "rmdir", "link", "sym", "trunc"))
    ]
    written = [line for line in writing if " = -1 E" not in line and "/dev/null" not in line]
    assert len(written) > 15
    assert not [line for line in written if f"{tmp_path}/out" not in line]
