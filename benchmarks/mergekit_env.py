"""A virtual environment of its own for mergekit, the tool that the benchmark compares with.

mergekit needs torch and transformers and pins its neighbours; rlmerge's environment stays clean of them. The folder is
made once; a stamp written at the very end tells a whole environment from an interrupted one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ENV = Path(__file__).resolve().parent / ".venv-mergekit"

# One pip command with torch pinned in it: left to itself, pip takes the newest torch and its CUDA libraries.
REQUIREMENTS = ("mergekit==0.1.5", "torch==2.13.0", "transformers>=5,<6")


def executable(name: str = "mergekit-yaml", env: Path = ENV) -> Path:
    """Path of a program in the environment (which may not exist yet)."""
    return env / "bin" / name


def ensure(env: Path = ENV) -> Path:
    """Make the environment unless a finished one with the same requirements is there; return its folder.

    Raises subprocess.CalledProcessError if pip fails; the unfinished folder is removed by the next call.
    """
    stamp = env / "benchmark-requirements.json"
    if stamp.exists() and json.loads(stamp.read_text()) == list(REQUIREMENTS) and executable(env=env).exists():
        return env
    print(f"making {env} ({', '.join(REQUIREMENTS)})", file=sys.stderr, flush=True)
    if env.exists():
        shutil.rmtree(env)
    venv.EnvBuilder(with_pip=True).create(env)
    subprocess.run([str(env / "bin" / "python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    stamp.write_text(json.dumps(list(REQUIREMENTS)))
    return env


def versions(env: Path = ENV) -> dict[str, str]:
    """Versions of the packages that matter for its speed, from the environment's own metadata."""
    code = (
        "import json, sys\n"
        "from importlib.metadata import version\n"
        "names = ('mergekit', 'torch', 'transformers', 'safetensors', 'numpy')\n"
        "print(json.dumps({'python': sys.version.split()[0], **{n: version(n) for n in names}}))\n"
    )
    done = subprocess.run([str(env / "bin" / "python"), "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    ensure()
    print(json.dumps(versions(), indent=2))
