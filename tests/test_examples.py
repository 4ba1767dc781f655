"""What a newcomer sees is true: the demo runs, recipes in pages parse, quoted output is real, pages are up to date."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import rlmerge
from rlmerge import errors

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIMIT = 60
"""Seconds that one run of the demo may take, compiling included."""


def run_demo(folder: Path) -> str:
    """What the demo prints."""
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT).stdout


def table_of(text: str) -> list[str]:
    """The table in the demo's output or in a page that quotes it: heading, rows; without indentation."""
    lines = [line.strip() for line in text.splitlines()]
    first = next(n for n, line in enumerate(lines) if line.startswith("sar   sar, δ² only"))
    last = next(n for n, line in enumerate(lines) if n > first and line.startswith("cosine intended"))
    return [line for line in lines[first : last + 1] if line]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("demo") / "demo-out"
    return run_demo(folder), folder


def test_demo_prints_its_table_and_runs_again(demo):
    text, folder = demo
    rows = table_of(text)
    for word in ("support", "conflict (of overlap)", "wins", "draws", "kept", "survival"):
        assert any(row.startswith(word) for row in rows), word
    assert "synthetic" in text
    assert rlmerge.verify(folder / "sar")["tensors"] > 0
    assert table_of(run_demo(folder)) == rows


def test_readme_quotes_what_the_demo_prints(demo):
    assert table_of(README) == table_of(demo[0]), "run `make demo` and paste its table into README.md"


def test_readme_quotes_what_its_merge_prints(demo):
    folder = demo[1].parent  # the shipped recipe says demo-out/models/...: found in the working directory
    command = [str(Path(sys.executable).parent / "rlmerge"), "merge", str(ROOT / "examples" / "sar.yml"), "merged"]
    wide = os.environ | {"COLUMNS": "100"}
    run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=LIMIT, env=wide)
    quoted = {line.strip() for line in README.splitlines()}
    rows = [line.strip() for line in run.stdout.splitlines() if "%" in line or "cosine" in line]
    assert len(rows) > 8
    assert [row for row in rows if row not in quoted] == []


def test_demo_imports_no_torch():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(ROOT / "examples" / "demo.py")], check=True, timeout=LIMIT)


def test_readme_names_the_two_commands():
    assert "    make demo\n    make test\n" in README


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_recipes_in_pages_parse(page):
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        rlmerge.parse_recipe(block, page)


def test_readme_shows_the_shipped_recipe():
    lines = (ROOT / "examples" / "sar.yml").read_text(encoding="utf-8").splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("#")) in README


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
