"""Runs `rlmerge` as a user does, here or in a process of its own, on a small good set of folders and a recipe."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.checkpoint.checkpoint_files import write_index, write_tensors

from rlmerge.cli.main import main

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.q_proj.weight": (8, 8),
    "model.layers.0.up_proj.weight": (12, 8),
    "model.layers.1.q_proj.weight": (8, 8),
    "model.layers.1.up_proj.weight": (12, 8),
    "model.norm.weight": (8,),
}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 16, "tie_word_embeddings": True
}  # fmt: skip
TOKENIZER: dict[str, Any] = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
RECIPE = """\
merge_method: sar
base_model: base
models:
  - model: e0
    fisher: f0
    parameters:
      density: 0.5
  - model: e1
    fisher: f1
parameters:
  lambda: 1.0
"""
TIES = """\
merge_method: ties
base_model: base
models:
  - model: e0
  - model: e1
parameters:
  weight: 1
  density: 0.5
"""


def weights(seed: int) -> dict[str, Any]:
    """The base (0), or an expert of it: a third of the coordinates differ by a sixteenth. Values that bf16 holds."""
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) + 2 for name, shape in SHAPES.items()}
    if seed:
        rng = np.random.default_rng(seed)
        signs = {name: rng.choice([0, 0, 0, 0, 1, -1], shape) for name, shape in SHAPES.items()}
        values = {name: (value * (1 + signs[name] / 16)).astype(np.float32) for name, value in values.items()}
    return {name: (value.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, value in values.items()}


def fishers(seed: int) -> dict[str, Any]:
    """Squares, so never negative."""
    rng = np.random.default_rng(100 + seed)
    return {name: rng.standard_normal(shape).astype(np.float32) ** 2 for name, shape in SHAPES.items()}


def small_files(folder: Path) -> None:
    """config.json, tokenizer and chat template."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }}\n{% endfor %}\n")


def good_set(folder: Path) -> Path:
    """base (two shards), e0, e1, their Fishers f0, f1, and recipe.yml (sar); ties.yml; returns the recipe's path."""
    base = weights(0)
    names = list(base)
    for file, part in ((FIRST, names[:3]), (SECOND, names[3:])):
        write_tensors(folder / "base" / file, {name: base[name] for name in part}, "BF16", {"format": "pt"})
    write_index(folder / "base", {name: FIRST if name in names[:3] else SECOND for name in names})
    for k in (0, 1):
        write_tensors(folder / f"e{k}" / "model.safetensors", weights(k + 1), "BF16", {"format": "pt"})
        write_tensors(folder / f"f{k}" / "fisher.safetensors", fishers(k))
    for name in ("base", "e0", "e1"):
        small_files(folder / name)
    (folder / "ties.yml").write_text(TIES)
    (folder / "recipe.yml").write_text(RECIPE)
    return folder / "recipe.yml"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document in one line."""
        assert self.out.endswith("\n"), self.out
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


def rlmerge(*arguments: object) -> Done:
    """The command line, in this process: `main()` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["rlmerge", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code: Any = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return Done(code or 0, out.getvalue(), err.getvalue())


def rlmerge_process(*arguments: object, script: bool = False, cwd: Path | None = None) -> Done:
    """The command line in a process of its own: the console script, or the module."""
    start = [str(Path(sys.executable).with_name("rlmerge"))] if script else [sys.executable, "-m", "rlmerge.cli.main"]
    done = subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def succeeded(done: Done) -> Done:
    """Asserts success."""
    assert done.code == 0, done.err
    return done


def refused(done: Done) -> str:
    """Asserts exit code 2 and exactly one message, before which there may be warnings; returns the message."""
    assert done.code == 2, (done.code, done.out, done.err)
    assert "Traceback" not in done.err, done.err
    lines = done.err.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("rlmerge: ")]
    assert len(starts) == 1, done.err
    assert all(line.startswith(("warning: ", " ", "compiling ")) for line in lines[: starts[0]]), done.err
    message = "\n".join(lines[starts[0] :]).removeprefix("rlmerge: ")
    assert message.strip()
    return message


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Every file below, with its time and bytes; folders and links too."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            found[str(path.relative_to(folder))] = (0, f"link to {path.readlink()}")
        elif path.is_file():
            found[str(path.relative_to(folder))] = (status.st_mtime_ns, path.read_bytes())
        else:
            found[str(path.relative_to(folder))] = (0, "folder")
    return found
