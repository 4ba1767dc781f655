"""The public surface: what `rlmerge` exports, and that importing it costs nothing."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlmerge

HEAVY = ("numba", "torch", "numpy", "transformers", "peft", "safetensors", "altair", "vl_convert")


def test_exports_are_alphabetical_and_complete():
    names = [name for name in rlmerge.__all__ if not name.startswith("_")]
    assert names == sorted(names)
    assert len(set(rlmerge.__all__)) == len(rlmerge.__all__)
    assert set(dir(rlmerge)) == set(rlmerge.__all__)


@pytest.mark.parametrize("name", rlmerge.__all__)
def test_every_export_can_be_imported_and_is_documented(name):
    value = getattr(rlmerge, name)
    assert value is not None
    if not name.startswith("_"):
        assert value.__doc__
        assert value.__module__.startswith("rlmerge")


def test_what_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'mergee'"):
        rlmerge.mergee  # noqa: B018


@pytest.mark.parametrize("module", ["rlmerge", "rlmerge.cli.main"])
def test_import_is_light(module):
    """No array library, no compiler: `rlmerge --help` answers in under 0.3 s."""
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_merging_imports_no_torch():
    code = (
        "import sys, rlmerge.api, rlmerge.kernels.plain; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False False"


def test_no_submodule_hides_a_public_function():
    """`import rlmerge.check` once made the function `rlmerge.check` a module."""
    modules = {module.name for module in pkgutil.iter_modules(rlmerge.__path__)}
    functions = {name for name in rlmerge.__all__ if callable(getattr(rlmerge, name))}
    assert modules & functions == set()


def test_types_are_for_everyone():
    """PEP 561: type checkers read our annotations only with this file."""
    assert (Path(rlmerge.__path__[0]) / "py.typed").read_bytes() == b""
