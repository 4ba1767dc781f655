"""What messages tell a user to run can be run."""

from __future__ import annotations

import pickle
import re
import tomllib
from pathlib import Path

from rlmerge.errors import INSTALL, MissingExtraError

ROOT = Path(__file__).resolve().parent.parent


def test_a_missing_extra_says_what_brings_it():
    error = MissingExtraError("--download", "huggingface_hub", "hub")
    assert str(error) == (
        "--download needs huggingface_hub, which is not installed. Run, in the clone: pip install -e '.[hub]'"
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_pages_and_messages_install_alike():
    """rlmerge is on no index: a page that said `pip install rlmerge` would bring something else, or nothing."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"pip install [^\n`]*\brlmerge\b", text), page
        for extra in re.findall(re.escape(INSTALL).replace(r"\{\}", "([a-z]+)"), text):
            assert extra in extras, page
