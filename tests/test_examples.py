"""What a newcomer sees is true: the demo runs, recipes in pages parse, quoted output is real, pages are up to date."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

import rlmerge
from rlmerge import errors
from rlmerge.stages import parse_stages

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIMIT = 240
"""Seconds that one run of the demo may take, compiling included."""
BINARY = str(Path(sys.executable).parent / "rlmerge")
QUIET = os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}


def run_demo(folder: Path) -> str:
    """What the demo prints, on few problems."""
    command = [BINARY, "demo", "-o", "demo-out", "--problems", "20"]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, timeout=LIMIT, env=QUIET
    ).stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("demo")
    return run_demo(folder), folder


def test_demo_measures_its_models_and_runs_again(demo):
    text, folder = demo
    found = json.loads((folder / "demo-out" / "demo.json").read_text())
    accuracy = {row["model"]: row for row in found["models"]}
    for expert, domain in (("rlvr-math-1", "math"), ("rlvr-code-1", "code")):
        assert accuracy[expert][domain]["value"] > accuracy["base"][domain]["value"] + 0.1
    for row in found["groups"]["rlvr-fusion-1"]["math"]:
        assert row["model"] in text
    for word in ("support", "conflict (of overlap)", "wins", "survival", "within noise", "no claim about methods"):
        assert word in text
    assert (folder / "demo-out" / "demo.svg").stat().st_size > 1000
    assert rlmerge.verify(folder / "demo-out" / "models" / "rlvr-fusion-1-sar" / "bf16")["tensors"] > 0
    assert run_demo(folder).splitlines()[:-1] == text.splitlines()[:-1]  # the last line has the seconds


def test_readme_quotes_what_its_merge_prints(demo):
    _, folder = demo  # the shipped recipe says demo-out/models/...: found in the working directory
    command = [BINARY, "merge", str(ROOT / "examples" / "sar.yml"), "merged"]
    run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=LIMIT, env=QUIET)
    quoted = [line.strip() for line in README.splitlines()]
    rows = [line.strip() for line in run.stdout.splitlines() if "%" in line or "cosine" in line]
    assert len(rows) > 8
    for row in rows:
        name = re.split(r"  +", row)[0]
        # what the Fishers decide can differ in the last digit on another machine: they are sampled
        exact = name.startswith(("support", "unique", "overlap", "conflict"))
        assert any(line == row if exact else line.startswith(name) for line in quoted), row


def test_readme_quotes_the_accuracies_of_the_shipped_models():
    made = json.loads((ROOT / "src" / "rlmerge" / "demo" / "data" / "made.json").read_text())
    for model in ("base", "rlvr-math-1", "rlvr-code-1", "rlvr-math-2", "rlvr-code-2"):
        line = next(line for line in README.splitlines() if line.split()[:1] == [model])
        for domain in ("math", "code"):
            assert f"{100 * made['accuracies'][domain][model]['value']:.1f} [" in line


def test_readme_quotes_what_the_report_says_of_noise(demo):
    """Sentences of the same shape, for the same references; their numbers are those of 400 problems."""
    shape = re.compile(r"^(?:math|code), against (?:the base|the \w+ expert|sar):", re.MULTILINE)
    assert shape.findall(demo[0]) == shape.findall(README)


def without_network() -> list[str]:
    """What to put before a command so that it has no network, where the system lets a user do that."""
    guard = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and subprocess.run([*guard, "true"], capture_output=True).returncode == 0:
        return guard
    return []


def test_the_models_of_the_demo_are_in_the_wheel(tmp_path):
    python = wheel_installed(tmp_path)
    command = [*without_network(), str(python), "-m", "rlmerge", "demo", "--models", "-o", "play"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=LIMIT, env=UNTOUCHED)
    (installed,) = (tmp_path / "venv" / "lib").glob("python*/site-packages/rlmerge")
    source = ROOT / "src/rlmerge"
    data = [path for path in source.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(data) > 10
    for path in data:
        assert (installed / path.relative_to(source)).read_bytes() == path.read_bytes()
    for path in (source / "demo/data/models").rglob("*.safetensors"):
        copied = tmp_path / "play" / "models" / path.relative_to(source / "demo/data/models")
        assert copied.read_bytes() == path.read_bytes()


@pytest.mark.long
def test_the_demo_runs_from_a_wheel_in_any_folder(tmp_path):
    pytest.importorskip("torch")
    python = wheel_installed(tmp_path)
    command = [*without_network(), str(python), "-m", "rlmerge", "demo", "--problems", "20", "--quiet", "--json"]
    run = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=LIMIT, env=UNTOUCHED
    )
    assert len(json.loads(run.stdout)["models"]) == 5
    assert (tmp_path / "demo-out" / "demo.txt").exists()


UNTOUCHED = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "PYTHONPATH")}


def wheel_installed(tmp_path: Path) -> Path:
    """A Python that has the wheel, in an environment of its own; what it depends on is borrowed from this one."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
        timeout=LIMIT,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 12 * 2**20
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=LIMIT)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = tmp_path / "venv" / "bin" / "python"
    shown = "import rlmerge; print(rlmerge.__file__)"
    place = subprocess.run([python, "-c", shown], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert place.stdout.startswith(str(site))
    return python


def test_readme_names_the_two_commands():
    assert "    make demo\n    make test\n" in README


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_recipes_in_pages_parse(page):
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        parse_stages(block, page)


def test_readme_shows_the_shipped_recipe():
    lines = (ROOT / "examples" / "sar.yml").read_text(encoding="utf-8").splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("#")) in README


def test_the_guide_shows_the_shipped_plugin_and_what_is_said_of_it():
    guide, plugin = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), ROOT / "examples" / "clipped.py"
    text = plugin.read_text(encoding="utf-8")
    assert f"```python\n{text}```" in guide
    assert len(text.splitlines()) < 20
    command = "rlmerge methods clipped --plugin examples/clipped.py"
    run = subprocess.run(
        [BINARY, *command.split()[1:]], cwd=ROOT, check=True, capture_output=True, text=True, env=QUIET
    )
    assert "".join(f"    {line}\n" for line in [f"$ {command}", *run.stdout.splitlines()]) in guide


def test_the_shipped_plugin_merges(tmp_path):
    golden = ROOT / "tests" / "golden"
    methods = rlmerge.load_plugins(ROOT / "examples" / "clipped.py")
    experts = [str(golden / "expert0"), str(golden / "expert1")]
    recipe = rlmerge.recipe_from_parts(str(golden / "base"), experts, "clipped", {"limit": 0.01}, methods=methods)
    plain = rlmerge.recipe_from_parts(str(golden / "base"), experts, "task_arithmetic", {"weight": 1.0})
    base = dict(rlmerge.merge(rlmerge.recipe_from_parts(None, [str(golden / "base")], "linear", {"weight": 1.0})))
    sums = dict(rlmerge.merge(plain))
    for name, array in rlmerge.merge(recipe):
        assert np.abs(array - np.clip(sums[name], base[name] - 0.01, base[name] + 0.01)).max() < 1e-6


def test_guide_quotes_the_error_of_a_misspelt_parameter(tmp_path):
    text = "merge_method: ties\nbase_model: base\nmodels:\n- model: math\n  parameters:\n    weight: 1\n    densty: 1\n"
    (tmp_path / "typo.yml").write_text(text, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "rlmerge", "merge", "typo.yml", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in ["$ rlmerge merge typo.yml out", *run.stderr.splitlines()]) in guide


def test_guide_quotes_what_a_check_of_its_stages_prints(tmp_path):
    shutil.copytree(ROOT / "src/rlmerge/demo/data/models", tmp_path / "demo-out" / "models")
    command = [BINARY, "check", str(ROOT / "examples" / "stages.yml")]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=LIMIT, env=QUIET)
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for line in run.stdout.splitlines()[:-1]:  # the last one has the seconds
        assert f"    {line.split('; memory')[0]}" in guide, line
    recipe = (ROOT / "examples" / "stages.yml").read_text(encoding="utf-8").splitlines(keepends=True)
    assert "".join(line for line in recipe if not line.startswith("#")) in guide


def test_file_tree_of_the_readme_is_true():
    section = README.split("## Files")[1].split("## Licence")[0]
    folders = [ROOT]
    entries = re.findall(r"^    ( *)(\S+)", section, re.MULTILINE)
    assert len(entries) > 20
    for indent, name in entries:
        depth = len(indent) // 2
        path = folders[depth] / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), f"README lists {path.relative_to(ROOT)}"
        folders[depth + 1 :] = [path]


def test_method_pages_are_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "generate_methods.py"))["pages"]()
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert found == made, "run: python docs/generate_methods.py"


def test_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = [name for name in rlmerge.__all__ if not name.startswith("__")]
    names += [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert [name for name in names if not re.search(rf"\b{name}\b", page)] == []


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs", "examples"])
def test_pages_hold_no_path_of_a_machine(page):
    place = ROOT / page
    for file in [place] if place.is_file() else [p for p in place.rglob("*") if p.suffix in {".md", ".py", ".yml"}]:
        assert not re.search(r"(?<![\w.])/(?:work|root|tmp|home)\b", file.read_text(encoding="utf-8")), file
