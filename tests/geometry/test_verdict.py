"""Votes at their thresholds, what decides, what warns, and recipes that follow."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from tests.geometry.geometry_models import make_base, train, write

import rlmerge
from rlmerge.errors import RecipeError
from rlmerge.geometry.verdict import COSINE, RELATIVE_NORM, SPECTRAL_SHIFT, UNCHANGED, judge


def scope(**changes: Any) -> Any:
    """The total of two experts as the verdict reads it, RLVR-like by size."""
    expert = {
        "support": 0.2,
        "support_bf16": 0.2,
        "relative_norm": 5e-4,
        "steps": {"dtype": "BF16", "at_least": [0, 1, 2], "share": [0.0, 0.4, 0.6]},
    }
    pair = {"a": "a", "b": "b", "cosine": 0.05, "jaccard": 0.5, "conflict_overlap": 0.45}
    null = {**pair, "cosine": 0.0, "jaccard": 0.3}
    experts = {"a": expert | changes, "b": expert | changes}
    return {"experts": experts, "pairs": [pair], "null": {"pairs": [null]}}


def spectra(shift: float | None) -> dict[str, Any]:
    return {"total": {"experts": {key: {"shift": {"nss": shift}} for key in "ab"}}, "warnings": ["of spectra"]}


LARGE = scope(support_bf16=0.95, support=0.95, relative_norm=0.01)


def collinear(total: Any) -> Any:
    """The same with a cosine that SFT of one task has."""
    return total | {"pairs": [total["pairs"][0] | {"cosine": 0.97}]}


def judged(total: Any, measured: Any = None, storage: Any = None) -> Any:
    return judge({"total": total, "layers": [], "kinds": [], "tensors": []}, storage, measured, lambda method: method)


@pytest.mark.parametrize(
    ("criterion", "value", "vote"),
    [
        (UNCHANGED, 0.36, "rlvr"), (UNCHANGED, 0.3599, "none"), (UNCHANGED, 0.19, "sft"), (UNCHANGED, 0.1901, "none"),
        (RELATIVE_NORM, 1e-3, "rlvr"), (RELATIVE_NORM, 3e-3, "sft"), (RELATIVE_NORM, 2e-3, "none"),
        (SPECTRAL_SHIFT, 1e-5, "rlvr"), (SPECTRAL_SHIFT, 1e-4, "none"), (SPECTRAL_SHIFT, 1e-3, "sft"),
        (COSINE, -1.0, "none"), (COSINE, 0.06, "none"), (COSINE, 0.97, "sft"), (UNCHANGED, None, "none"),
    ],
)  # fmt: skip
def test_votes(criterion, value, vote):
    assert criterion.vote(value) == vote


def test_size_alone_decides_with_a_warning():
    found = judged(scope())
    assert found["looks"] == "RLVR-like"
    assert [text for text in found["warnings"] if "follows learning rate" in text]
    evidence = found["experts"]["a"]["evidence"]
    assert [(one["criterion"], one["vote"]) for one in evidence] == [
        (UNCHANGED.name, "rlvr"), (RELATIVE_NORM.name, "rlvr"), (COSINE.name, "none")
    ]  # fmt: skip
    assert (evidence[0]["rlvr"], evidence[0]["sft"], evidence[2]["rlvr"]) == ("≥ 0.36", "≤ 0.19", "never")


def test_direction_decides_over_size():
    """Sparsity, norm and spectral shift grow with the learning rate; a common direction does not."""
    assert judged(LARGE)["looks"] == "SFT-like"
    assert judged(LARGE, spectra(1e-5))["looks"] == "mixed"
    assert judged(LARGE, spectra(1e-4))["looks"] == judged(LARGE, spectra(None))["looks"] == "SFT-like"
    found = judged(LARGE, spectra(1e-3))
    assert [text for text in found["warnings"] if "follows learning rate" in text]
    assert "of spectra" in found["warnings"]
    near = collinear(scope())
    assert judged(near)["looks"] == "SFT-like"
    assert not [text for text in judged(near)["warnings"] if "follows learning rate" in text]
    near["null"]["pairs"][0]["cosine"] = 0.5
    assert judged(near)["looks"] == "RLVR-like"


def test_mixed():
    """Votes that disagree; experts that disagree; nobody speaks."""
    assert judged(scope(relative_norm=0.01))["looks"] == "mixed"
    unlike = scope()
    unlike["experts"]["b"] |= {"support_bf16": 0.95, "support": 0.95, "relative_norm": 0.01}
    found = judged(unlike)
    assert (found["looks"], found["experts"]["a"]["looks"], found["experts"]["b"]["looks"]) == (
        "mixed", "RLVR-like", "SFT-like"
    )  # fmt: skip
    assert judged(scope(support_bf16=0.7, relative_norm=2e-3))["looks"] == "mixed"


def test_warnings():
    texts = judged(scope(support=0.95))["warnings"]
    assert any("95.0% of the weights changed as stored, 20.0% as bf16" in text for text in texts)
    single = scope(steps={"dtype": "BF16", "at_least": [0, 1], "share": [0.0, 0.7]})
    assert any("70% of its changes are one step of BF16" in text for text in judged(single)["warnings"])
    single["experts"]["a"]["steps"]["dtype"] = single["experts"]["b"]["steps"]["dtype"] = "F32"
    assert not any("one step" in text for text in judged(single)["warnings"])
    assert any("does not look trained" in text for text in judged(scope(relative_norm=0.8))["warnings"])
    like = scope()
    assert not any("as in the null model" in text for text in judged(like)["warnings"])
    like["null"]["pairs"][0]["jaccard"] = 0.49
    assert any("as in the null model (Jaccard 0.500 and 0.490)" in text for text in judged(like)["warnings"])


def test_recipes_follow():
    """TIES only where more than learning rate says SFT; one expert is scaled; fragile averages are advised against."""
    assert judged(scope())["recommended"]["recipe"] == "sar"
    assert judged(LARGE, spectra(1e-3))["recommended"]["recipe"] == "sar"
    assert judged(collinear(LARGE))["recommended"]["recipe"] == "ties"
    alone = scope()
    del alone["experts"]["b"]
    alone["pairs"] = alone["null"]["pairs"] = []
    assert judged(alone)["recommended"]["recipe"] == "task_arithmetic"

    def stored(method, survival):
        return {"method": method, "settings": {}, "survival": survival, "cosine": 0.8, "norm_ratio": 1.0}

    storage = {"dtype": "BF16", "merges": [stored("average", 0.7), stored("sar", 0.999)]}
    reasons = " ".join(judged(scope(), None, storage)["recommended"]["reasons"])
    assert "Of an average only 70%" in reasons
    assert "99.9% survive in bf16." in reasons
    storage["merges"] = [stored("average", 0.95), stored("sar", 0.6)]
    reasons = " ".join(judged(scope(), None, storage)["recommended"]["reasons"])
    assert "an average" not in reasons
    assert "60.0% survive in bf16: add `out_dtype: float32`" in reasons


def test_the_recipe_runs_from_where_it_is_written(tmp_path, monkeypatch):
    """Relative paths are so from the recipe's folder; names stay; what is there is not written over."""
    base = make_base()
    write(tmp_path / "models", base, {"a": train(base, 1), "b": train(base, 2)})
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"names": ["one", "two"], "storage": False, "kernels": "numpy"}
    found = rlmerge.inspect("models/base", ["models/a", "models/b"], recipe="recipes/it.yml", **options)
    text = (tmp_path / "recipes" / "it.yml").read_text()
    assert text.startswith("# ")
    data = yaml.safe_load(text)
    assert data["models"] == [{"model": "../models/a", "name": "one"}, {"model": "../models/b", "name": "two"}]
    assert yaml.safe_load(found["verdict"]["recommended"]["recipe"]) == data
    monkeypatch.chdir("/")
    rlmerge.merge_to_folder(tmp_path / "recipes" / "it.yml", tmp_path / "out", threads=1, kernels="numpy")
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("recipes/it.yml", "exists already"),
        ("it.json", "ends in .yml"),
        ("no/it.yml", "no folder"),
    ):
        with pytest.raises(RecipeError, match=message):
            rlmerge.inspect("models/base", "models/a", recipe=name, kernels="numpy")
