"""The measures of function space, end to end, on the demo's base and experts: a million parameters, trained."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from rlmerge.demo.assets import DATA  # noqa: E402
from rlmerge.errors import GeometryError, MismatchError  # noqa: E402
from rlmerge.evaluate.backend import Sampling  # noqa: E402
from rlmerge.evaluate.results import scores  # noqa: E402
from rlmerge.evaluate.run import TransformersBackend, evaluate, load_model  # noqa: E402
from rlmerge.evaluate.tasks import load_task  # noqa: E402
from rlmerge.fisher.data import SequenceChoice  # noqa: E402
from rlmerge.fisher.given import Progress  # noqa: E402
from rlmerge.geometry.function import FunctionSettings, measure_function  # noqa: E402
from rlmerge.geometry.function_types import Function  # noqa: E402
from rlmerge.geometry.landscape import Landscape  # noqa: E402
from rlmerge.geometry.problem_sets import Asked, draw_set  # noqa: E402
from rlmerge.geometry.weights import Weights, between  # noqa: E402

BASE, MATH, CODE = (DATA / "models" / name / "bf16" for name in ("base", "rlvr-math-1", "rlvr-code-1"))
GOLD = SequenceChoice("gold", sequences=12, max_new_tokens=48)
NOTHING = FunctionSettings(GOLD, points=0, grid=(), sigmas=(), scales=(), divergence=False)


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], list[Progress], list[str]]:
    """All measures of a math and a code expert, as packs."""
    heard: list[Progress] = []
    told: list[str] = []
    settings = FunctionSettings(
        GOLD, points=3, grid=(0.0, 0.5, 1.0), sigmas=(0.01,), scales=(1.0,), directions=2, pass_rate=6
    )
    experts, data = {"math": MATH, "code": CODE}, {"math": "math:0", "code": "code:0"}
    return measure_function(BASE, experts, data, settings, heard.append, tell=told.append), heard, told


def loss_of(found: dict[str, Any], model: str | None, name: str) -> float:
    (row,) = (row for row in found["models"] if row["model"] == model)
    return next(one["value"] for one in row["losses"] if one["set"] == name)


def test_every_section_is_there_and_is_json(measured):
    found, _, _ = measured
    assert list(found) == [
        "settings", "sets", "models", "deltas", "divergence", "paths", "planes", "sharpness", "robustness"
    ]  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [(one["name"], one["experts"], one["sequences"]) for one in found["sets"]] == [
        ("code:0", ["code"], 12), ("math:0", ["math"], 12)
    ]  # fmt: skip
    ends = [(path["start"], path["end"]) for path in found["paths"]]
    assert ends == [(None, "code"), (None, "math"), ("code", "math")]
    assert [(row["expert"], row["set"]) for row in found["divergence"]] == [
        ("code", "code:0"), ("math", "code:0"), ("code", "math:0"), ("math", "math:0")
    ]  # fmt: skip
    assert [(row["expert"], row["along"], row["set"]) for row in found["robustness"]] == [
        ("code", "math", "code:0"), ("math", "code", "math:0")
    ]  # fmt: skip


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what a type of `function_types` says, to the last key."""
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        known = kind.__required_keys__ <= value.keys() <= hints.keys()
        return known and all(fits(inner, hints[key]) for key, inner in value.items())
    origin, inner = get_origin(kind), get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is Literal:
        return value in inner
    return isinstance(value, kind)


def test_the_types_say_what_is_there(measured):
    found, _, _ = measured
    assert fits(found, Function)
    assert not fits({**found, "paths": [{**found["paths"][0], "start": 1}]}, Function)
    assert not fits({**found, "sets": [{**found["sets"][0], "more": 1}]}, Function)


def test_training_shows(measured):
    """Each expert is better than the base on its own task, and away from it there; the other's delta costs more than
    its control.
    """
    found, _, _ = measured
    for key in ("math", "code"):
        assert loss_of(found, key, f"{key}:0") < loss_of(found, None, f"{key}:0")
        on_set = {row["expert"]: row for row in found["divergence"] if row["set"] == f"{key}:0"}
        assert on_set[key]["entropy"]["value"] < on_set[key]["entropy_base"]["value"]
        assert on_set["math"]["entropy_base"] == on_set["code"]["entropy_base"]
    kl = {(row["expert"], row["set"]): row["kl_expert_base"]["value"] for row in found["divergence"]}
    assert kl["math", "math:0"] > kl["code", "math:0"] > 0.0
    for row in found["robustness"]:
        (step,) = row["scales"]
        assert step["rise"] > 3 * step["control"]["rise"]
    assert all(0.5 < row["support"] < 1.0 for row in found["deltas"])


def test_ends_of_paths_and_corners_of_planes_are_the_models(measured):
    found, _, _ = measured
    for path in found["paths"]:
        for curve in path["curves"]:
            if curve["measure"] == "loss":
                ends = [curve["values"][place]["value"] for place in (0, -1)]
                assert ends == [loss_of(found, path[end], curve["set"]) for end in ("start", "end")]
            assert len(curve["values"]) == len(path["alphas"]) == 3
            assert curve["barrier"]["value"] >= 0.0 >= curve["dip"]["value"]
    (plane,) = found["planes"]
    assert (plane["a"], plane["b"]) == ("code", "math")
    for one in plane["losses"]:
        corners = [one["values"][a][b] for a, b in ((0, 0), (2, 0), (0, 2))]
        assert corners == [loss_of(found, model, one["set"]) for model in (None, "code", "math")]
        middle = next(curve for curve in found["paths"][2]["curves"] if curve["set"] == one["set"])["values"][1]
        assert one["values"][1][1] == middle["value"]


def test_pass_rates_are_those_of_eval(measured, tmp_path):
    found, _, _ = measured
    model, tokenizer = load_model(MATH, base=BASE)
    task = load_task("math:0", "test", 12)
    task = replace(task, problems=task.problems[:6])
    results = evaluate(
        TransformersBackend(model, tokenizer), task, tmp_path / "r", label="m", sampling=Sampling(0.0, 48)
    )
    expected = np.mean(scores(results).c)
    rates = next(row for row in found["models"] if row["model"] == "math")["pass_rates"]
    assert next(one for one in rates if one["set"] == "math:0")["value"] == expected
    curve = next(c for c in found["paths"][1]["curves"] if c["measure"] == "failure")
    assert curve["values"][-1]["value"] == pytest.approx(1.0 - expected)


def test_what_it_takes_is_said_and_kept(measured):
    _, heard, told = measured
    assert heard[-1].done == heard[-1].total
    passes = [step for step in heard if step.what not in ("loading", "sampling")]
    assert [step.done for step in passes] == list(range(1, heard[-1].total + 1))
    assert {step.what for step in passes} == {"models", "divergence", "paths", "planes", "sharpness", "robustness"}
    (text,) = told
    assert text.startswith(f"{heard[-1].total - 12} passes over 12 sequences follow")


def test_the_same_numbers_in_another_run(measured):
    found, _, _ = measured
    settings = replace(NOTHING, points=3)
    again = measure_function(BASE, {"code": CODE, "math": MATH}, {"code": "code:0", "math": "math:0"}, settings)
    losses = [[c for c in path["curves"] if c["measure"] == "loss"] for path in found["paths"]]
    assert [path["curves"] for path in again["paths"]] == losses


def test_copies_have_no_barrier_and_no_divergence():
    settings = replace(NOTHING, points=5, divergence=True)
    found = measure_function(BASE, {"one": MATH, "two": MATH, "same": BASE}, "math:0", settings)
    (one,) = found["sets"]
    assert one["experts"] == ["one", "same", "two"]
    path = next(p for p in found["paths"] if (p["start"], p["end"]) == ("one", "two"))
    assert path["distance"] == 0.0
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "at": 0.0}
    assert path["curves"][0]["barrier"] == path["curves"][0]["dip"] == nothing
    rows = {row["expert"]: row for row in found["divergence"]}
    assert rows["same"]["kl_expert_base"]["value"] == rows["same"]["kl_base_expert"]["value"] == 0.0
    assert rows["one"]["kl_expert_base"] == rows["two"]["kl_expert_base"]
    assert rows["one"]["kl_expert_base"]["value"] > 0.01


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the neurons of its feed-forward layers in another order: the same function."""
    folder = tmp_path_factory.mktemp("models") / "permuted"
    shutil.copytree(BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("mlp.down_proj.weight")]:
        order = torch.randperm(tensors[name].shape[1], generator=generator)
        tensors[name] = tensors[name][:, order].contiguous()
        for other in ("gate_proj", "up_proj"):
            rows = name.replace("down_proj", other)
            tensors[rows] = tensors[rows][order].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_neurons_in_another_order_are_a_barrier_away(permuted):
    """Two models of one function, far apart: no difference of losses, and a high barrier between (Entezari et al. 2022,
    arXiv 2110.06296).
    """
    settings = replace(NOTHING, points=5, divergence=True)
    found = measure_function(BASE, {"permuted": permuted}, "math:0", settings)
    (path,) = found["paths"]
    (curve,) = path["curves"]
    ends = [curve["values"][place]["value"] for place in (0, -1)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    barrier = curve["barrier"]
    assert barrier["at"] == 0.5
    assert barrier["value"] > barrier["low"] > 5 * ends[0]
    assert abs(found["divergence"][0]["kl_expert_base"]["value"]) < 1e-6
    # the middle, by hand
    one, two = (load_file(folder / "model.safetensors") for folder in (BASE, permuted))
    model, tokenizer = load_model(BASE)
    model.load_state_dict({name: (one[name].float() + two[name].float()) / 2 for name in one}, strict=False)
    total = count = 0.0
    for problem in load_task("math:0", "test", 12).problems:
        prompt = tokenizer(problem.prompt)["input_ids"]
        text = problem.completion or ""
        end = problem.meta.get("end") or ""
        answer = tokenizer(text if text.endswith(end) else text + end, add_special_tokens=False)["input_ids"]
        answer = answer if end else [*answer, tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        total -= float(sum(p[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1])))
        count += len(answer)
    assert curve["values"][2]["value"] == pytest.approx(total / count, rel=1e-5)


def test_losses_belong_to_their_problems():
    """Whatever the order in batches: sequences of one problem, one problem after the other."""
    task = load_task("math:0", "test", 7)
    asked = Asked("x", "x", ("a",), task, GOLD)
    model, tokenizer = load_model(BASE)
    one = draw_set(asked, model, tokenizer, False, 60, lambda step: None)
    assert len(one.batches) > 2
    losses = one.losses(model)
    assert len(losses) == len(one.tokens) == 7
    for place, problem in enumerate(task.problems):
        alone = replace(asked, task=replace(task, problems=[problem]))
        single = draw_set(alone, model, tokenizer, False, 60, lambda step: None)
        assert single.tokens[0] == one.tokens[place]
        assert single.losses(model)[0] == pytest.approx(losses[place], rel=1e-4)


def test_own_sequences_are_a_set_for_each_expert():
    choice = SequenceChoice("own", sequences=6, max_new_tokens=48)
    settings = replace(NOTHING, choice=choice, points=2)
    found = measure_function(BASE, {"a": MATH, "b": MATH}, "math:0", settings)
    assert [(one["name"], one["data"], one["experts"]) for one in found["sets"]] == [
        ("a", "math:0", ["a"]), ("b", "math:0", ["b"])
    ]  # fmt: skip
    for one in found["sets"]:
        assert one["accepted"] > 0.8 * one["tried"]  # of the base's completions, half are
    # equal models draw equal sequences
    assert loss_of(found, "a", "a") == loss_of(found, "b", "b") < loss_of(found, None, "a")


def test_sequences_of_one_problem_are_drawn_again_together(tmp_path):
    """Attempts at a problem are no problems of their own."""
    lines = [
        json.dumps({"prompt": one.prompt, "answer": one.answer, "verifier": "exact", "meta": one.meta})
        for one in load_task("math:0", "test", 3).problems
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(lines))
    choice = SequenceChoice("sampled", sequences=8, max_new_tokens=48)
    (one,) = measure_function(BASE, {"a": MATH}, file, replace(NOTHING, choice=choice))["sets"]
    assert (one["problems"], one["sequences"]) == (3, 8)


def test_an_adapter_is_not_rounded(tmp_path):
    """fp32(base + scale·B·A), although the base is bf16."""
    name = "model.layers.0.self_attn.q_proj"
    shape = load_file(BASE / "model.safetensors")[f"{name}.weight"].shape
    a, b = torch.randn(2, shape[1]), torch.randn(shape[0], 2) * 1e-3
    folder = tmp_path / "lora"
    folder.mkdir()
    module = f"base_model.model.{name}"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(BASE)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    found = measure_function(BASE, {"lora": folder}, "math:0", NOTHING)
    (delta,) = found["deltas"]
    expected = float((2.0 * b.double() @ a.double()).norm())
    assert delta["norm"] == pytest.approx(expected, rel=1e-5)
    assert delta["support"] == pytest.approx(shape.numel() / 1_095_424, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": 1}, "2 or more, or 0"),
        ({"directions": 0, "sigmas": (0.1,)}, "at least 1"),
        ({"sigmas": (0.0,)}, "above 0"),
        ({"grid": (math.nan,)}, "finite"),
        ({"choice": SequenceChoice("policy")}, "own, gold or sampled"),
        ({"pass_rate": -1}, "pass_rate"),
    ],
)
def test_what_means_nothing_is_refused(change, message):
    with pytest.raises(GeometryError, match=message):
        measure_function(BASE, {"a": MATH}, "math:0", replace(NOTHING, **change))


def test_data_and_models_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(GeometryError, match="given for a, and the experts are a, b"):
        measure_function(BASE, {"a": MATH, "b": CODE}, {"a": "math:0"}, NOTHING)
    with pytest.raises(GeometryError, match="no experts"):
        measure_function(BASE, {}, "math:0", NOTHING)
    file = tmp_path / "plain.jsonl"
    file.write_text('{"prompt": "2+2=", "completion": "4"}\n')
    with pytest.raises(GeometryError, match=r"plain.jsonl: pass rates .* 'verifier'"):
        measure_function(BASE, {"a": MATH}, str(file), replace(NOTHING, choice=SequenceChoice("gold"), pass_rate=1))
    from tests.evaluate.test_run import write_model

    other = write_model(tmp_path / "other", 0)
    with pytest.raises(MismatchError, match="other"):
        measure_function(BASE, {"a": other}, "math:0", NOTHING)


def test_a_point_is_measured_once():
    placed = []

    class Count:
        name, tokens = "count", np.ones(2)

        def losses(self, model: Any) -> np.ndarray:
            placed.append(1)
            return np.ones(2)

    model = torch.nn.Linear(2, 2)
    weights = Weights(model)
    weights.add("a", torch.nn.Linear(2, 2), "a")
    sets: Any = [Count(), Count()]
    space = Landscape(weights, sets, 0, GOLD, False, 10, 0, lambda: None)
    for of in ((0,), (0, 1), (1,)):
        space.losses(between("", "a", 0.5), of)
    assert len(placed) == 2
