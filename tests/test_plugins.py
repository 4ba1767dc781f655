"""Plugins: a method in a file of one's own, the guarantees that it keeps, and what is said of its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.cli.command_line import good_set, refused, rlmerge, succeeded
from tests.methods.small_models import (
    FORMS,
    merge_values,
    read_values,
    same_bits,
    small_blocks,
    sparse_model,
    write_all,
)

import rlmerge as api
from rlmerge.errors import OutputError, PluginError, RecipeError
from rlmerge.plugins import Parameter, load_plugins, method

CLIPPED = '''\
import numpy as np

from rlmerge.plugins import Parameter, method


@method(
    "clipped",
    "sum of the weighted deltas, no change larger than a limit",
    parameters=[
        Parameter("weight", "number", 1.0, "factor of this model's delta", per_model=True),
        Parameter("limit", "number", 0.125, "largest change of a weight", above=0),
    ],
)
def clipped(base, deltas, weight, limit):
    """θ = θ0 + clip(Σ wi·δi, −limit, limit)"""
    return base + np.clip(sum(w * d for w, d in zip(weight, deltas)), -limit, limit)
'''
SUM = """\
from rlmerge.plugins import Parameter, method

PARAMETERS = [
    Parameter("weight", "number", 1.0, "factor of this model's delta", per_model=True),
    Parameter("lambda", "number", 1.0, "factor of the merged delta"),
]


@method("sum", "task arithmetic", parameters=PARAMETERS{more})
def total(base, deltas, weight, lambda_):
    merged = 0.0
    for factor, delta in zip(weight, deltas):
        merged = merged + factor * delta
    return base + lambda_ * merged
"""
OWN = """\
from rlmerge.methods.base import Method
from rlmerge.methods.task_arithmetic import TaskArithmetic


class Doubled(TaskArithmetic):
    name = "doubled"
    summary = "twice the sum"

    def merge(self, block, task, results):
        merged = super().merge(block, task, results)
        merged.values = [change.applied(block) for change in merged.values]
        for change in merged.values:
            change.values = change.values + (change.values - change.old)
        return merged


METHOD = Doubled()
"""


def plugin(folder: Path, text: str, name: str = "own.py") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def recipe_of(folder: Path, name: str, file: Path | None, keys=("e0", "e1", "e2"), parameters=None, **top):
    data = {"merge_method": name, "base_model": "base", "parameters": parameters or {}, **top}
    data["models"] = [{"model": key} for key in keys]
    methods = None if file is None else load_plugins(file)
    return api.parse_recipe(json.dumps(data), folder=folder, methods=methods)


def models(folder: Path, dtype: str = "F32", count: int = 3, grid: bool = True):
    base, experts = sparse_model(np.random.default_rng(5), count, dtype, grid=grid)
    write_all(folder, base, experts, dtype=dtype)
    return base, experts


# ---- What it computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sees", ["changed", "every", "tensor"])
@pytest.mark.parametrize("dtype", FORMS)
def test_a_function_merges_to_the_same_bits_as_the_method_of_ours(tmp_path, sees, dtype):
    """task_arithmetic in Python: patches, whole blocks and whole tensors; any cut into blocks, threads and kernels."""
    models(tmp_path, dtype)
    file = plugin(tmp_path, SUM.replace("{more}", f", sees={sees!r}"))
    parameters = {"weight": [0.5, 1.0], "lambda": [{"filter": "norm", "value": 0.25}, {"value": 2.0}]}
    wanted = merge_values(recipe_of(tmp_path, "task_arithmetic", None, parameters=parameters))
    recipe = recipe_of(tmp_path, "sum", file, parameters=parameters)
    assert same_bits(merge_values(recipe), wanted)
    with small_blocks(7, 14):
        assert same_bits(merge_values(recipe, kernels="numpy"), wanted)
        assert same_bits(dict(api.merge(recipe, threads=3)), wanted)


def test_what_the_function_sees(tmp_path):
    """Changed coordinates only, all experts at once, in the order of the recipe, with 0 where one changed nothing."""
    base = {"w": np.arange(8, dtype=np.float32).reshape(2, 4)}
    b, a = base["w"].copy(), base["w"].copy()
    b[0, 1], b[1, 2], a[1, 2], a[1, 3] = 9, 10, 11, 12
    write_all(tmp_path, base, {"b": {"w": b}, "a": {"w": a}})
    seen = []

    @method("spy", "looks", parameters=[Parameter("on", "choice", "x", "word", True, choices=("x", "y"))])
    def spy(base, deltas, on):
        seen.append((base.tolist(), deltas.tolist(), on, base.flags.writeable))
        return base + deltas.sum(axis=0)

    data = {"merge_method": "spy", "base_model": "base", "models": [{"model": "b"}, {"model": "a"}]}
    data["models"][1]["parameters"] = {"on": "y"}
    recipe = api.parse_recipe(json.dumps(data), folder=tmp_path, methods={"spy": spy})
    assert merge_values(recipe)["w"].tolist() == [[0, 9, 2, 3], [4, 5, 15, 12]]
    assert seen[0] == ([1.0, 6.0, 7.0], [[8.0, 4.0, 0.0], [0.0, 5.0, 5.0]], ["x", "y"], False)


def test_a_method_of_ones_own_class(tmp_path):
    base, experts = models(tmp_path)
    recipe = recipe_of(tmp_path, "doubled", plugin(tmp_path, OWN), parameters={"weight": 1.0})
    found = merge_values(recipe)
    for name, value in base.items():
        total = sum(tensors[name].astype(np.float64) - value for tensors in experts.values())
        assert np.abs(found[name] - (value + 2 * total)).max() < 1e-5


def test_coordinates_must_be_on_their_own(tmp_path):
    models(tmp_path, grid=False)
    text = CLIPPED.replace("0.125", "9.0").replace(
        "    return base", "    deltas = deltas / np.abs(deltas).max()\n    return base"
    )
    recipe = recipe_of(tmp_path, "clipped", plugin(tmp_path, text))
    with pytest.raises(PluginError, match=r"own\.py:6: method 'clipped' at .*: a coordinate comes out .*sees='tensor'"):
        merge_values(recipe)
    whole = text.replace("    parameters=[", '    sees="tensor",\n    parameters=[')
    merge_values(recipe_of(tmp_path, "clipped", plugin(tmp_path, whole)))


def test_unchanged_coordinates_are_not_left_out_in_silence(tmp_path):
    models(tmp_path)
    text = CLIPPED.replace("return base +", "return 0.5 * base +")
    with pytest.raises(PluginError, match=r"where no expert changed anything it makes .* of .*sees='every'"):
        merge_values(recipe_of(tmp_path, "clipped", plugin(tmp_path, text)))
    text = text.replace("    parameters=[", '    sees="every",\n    parameters=[')
    found = merge_values(recipe_of(tmp_path, "clipped", plugin(tmp_path, text), ["e0"]))
    base = read_values(tmp_path / "base")
    expert = read_values(tmp_path / "e0")
    same = {name: base[name] == expert[name] for name in base}
    assert all((found[name] == base[name] * np.float32(0.5))[same[name]].all() for name in base)


# ---- The engine's guarantees ------------------------------------------------------------------------------------


def test_a_changed_plugin_refuses_to_resume(tmp_path):
    models(tmp_path)
    file = plugin(tmp_path, CLIPPED)
    done = []

    def stop(step: api.Step) -> None:
        if step.units:
            done.append(step.units)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.merge_to_folder(recipe_of(tmp_path, "clipped", file), tmp_path / "out", threads=1, progress=stop)
    assert done
    plugin(tmp_path, CLIPPED + "# a word\n")
    with pytest.raises(OutputError, match="another plugin"):
        api.merge_to_folder(recipe_of(tmp_path, "clipped", file), tmp_path / "out", threads=1)
    plugin(tmp_path, CLIPPED)
    outcome = api.merge_to_folder(recipe_of(tmp_path, "clipped", file), tmp_path / "out", threads=1)
    assert outcome.resumed_units > 0
    written = json.loads((tmp_path / "out" / "rlmerge.json").read_text())
    assert written["plugin"]["file"] == "own.py"
    assert "`clipped` of a plugin (own.py)" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "rlmerge.json").read_text()


def test_a_method_that_python_hands_over_is_known_by_its_source(tmp_path):
    models(tmp_path)
    plans = []
    for factor in (1.0, 2.0):
        if factor == 1.0:

            @method("mine", "sum")
            def mine(base, deltas):
                return base + deltas.sum(axis=0)
        else:

            @method("mine", "sum")
            def mine(base, deltas):
                return base + 2.0 * deltas.sum(axis=0)

        data = {"merge_method": "mine", "base_model": "base", "models": [{"model": "e0"}]}
        recipe = api.parse_recipe(json.dumps(data), folder=tmp_path, methods={"mine": mine})
        from rlmerge.planner import make_plan

        plans.append(make_plan(recipe).digest())
        assert make_plan(recipe).digest() == plans[-1]
    assert plans[0] != plans[1]
    ours = make_plan(recipe_of(tmp_path, "task_arithmetic", None, parameters={"weight": 1}))
    assert ours.to_dict()["plugins"] == []


def test_a_sweep_over_its_parameters(tmp_path):
    models(tmp_path)
    recipe = recipe_of(tmp_path, "clipped", plugin(tmp_path, CLIPPED))
    sweep = [{"limit": 0.0625}, {"limit": 0.25}]
    api.merge_to_folder(recipe, tmp_path / "out", sweep=sweep)
    for point in sweep:
        alone = merge_values(recipe.with_settings(point))
        assert same_bits(read_values(tmp_path / "out" / f"limit={point['limit']}"), alone)


# ---- The command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    good_set(folder)
    plugin(folder, CLIPPED)
    plugin(folder, SUM.replace("{more}", ""), "two.py")
    (folder / "own.yml").write_text("merge_method: clipped\nbase_model: base\nmodels: [{model: e0}, {model: e1}]\n")
    return folder


def test_every_command_takes_it(good, tmp_path):
    own = ("--plugin", good / "own.py")
    assert "largest change of a weight; default 0.125, global" in succeeded(rlmerge("methods", "clipped", *own)).out
    listed = succeeded(rlmerge("methods", *own, "--plugin", good / "two.py")).out
    assert "\nclipped " in listed
    assert "\nsum " in listed
    assert "\nties " in listed
    assert "limit: 0.125" in succeeded(rlmerge("explain", good / "own.yml", *own)).out
    assert succeeded(rlmerge("check", good / "own.yml", *own, "--json")).json["summary"]["method"] == "clipped"
    assert "clipped" in succeeded(rlmerge("schema", *own, "--json")).json["properties"]["merge_method"]["enum"]
    done = rlmerge("merge", good / "own.yml", tmp_path / "out", *own, "--kernels", "numpy", "--set", "limit=0.01", "-q")
    succeeded(done)
    recipe = api.load_recipe(good / "own.yml", load_plugins(good / "own.py")).with_settings({"limit": 0.01})
    found = read_values(tmp_path / "out")
    assert same_bits(found, merge_values(recipe))
    assert not same_bits(found, merge_values(recipe.with_settings({"limit": 1.0})))


def test_mistakes_in_its_parameters_are_those_of_any_method(good):
    own = ("--plugin", good / "own.py")
    message = refused(rlmerge("check", good / "own.yml", *own, "--set", "limit=0"))
    assert "--set limit: expected a number > 0, found 0" in message
    message = refused(rlmerge("check", good / "own.yml", *own, "--set", "limmit=1"))
    assert "Did you mean 'limit'? 'clipped' takes: weight (per model); limit (global)." in message
    message = refused(rlmerge("check", good / "own.yml"))
    assert "there is no merge method 'clipped'" in message
    assert "--plugin FILE" in message
    assert "Did you mean 'clipped'?" in refused(rlmerge("methods", "cliped", *own))


@pytest.mark.parametrize("key", ["plugin", "plugins"])
def test_a_recipe_cannot_name_one(good, key):
    with pytest.raises(RecipeError, match=r"a recipe cannot name a plugin: .*--plugin FILE"):
        api.parse_recipe((good / "own.yml").read_text() + f"{key}: own.py\n", methods=load_plugins(good / "own.py"))


def test_an_error_in_its_code_is_named_with_file_and_line(good, tmp_path):
    file = plugin(tmp_path, CLIPPED.replace("-limit, limit)", "-limit, limit[0])"))
    recipe = ("merge", good / "own.yml", tmp_path / "out", "--plugin", file, "--kernels", "numpy")
    message = refused(rlmerge(*recipe))
    assert f"{file}:16: method 'clipped' at model." in message
    assert "TypeError: 'float' object is not subscriptable" in message
    assert "deltas fp64[2, " in message
    broken = plugin(tmp_path, OWN.replace("change.old)", "change.odl)"), "class.py")
    parts = ["--base", good / "base", "--expert", good / "e0", "--method", "doubled", "--set", "weight=1"]
    done = rlmerge("merge", tmp_path / "class-out", *parts, "--plugin", broken, "--kernels", "numpy", "--json")
    message = refused(done)
    assert f"{broken}:13: AttributeError" in message
    assert "change.values = change.values + (change.values - change.odl)" in message
    assert done.json["error"] == "PluginError"


@pytest.mark.parametrize("way", ["print('seen', 1)", "sys.stdout.write('seen\\n')", "print('seen', file=OUT)"])
def test_what_it_prints_goes_to_stderr(good, tmp_path, way):
    """From its first line, from its function, in any thread: stdout is what the command says."""
    start = f"import sys\nOUT = sys.stdout\ndef say():\n    {way}\nsay()\n"
    text = CLIPPED.replace("    return base", "    say()\n    return base")
    own = ("--plugin", plugin(tmp_path, start + text))
    for command in (("schema",), ("methods", "clipped"), ("check", good / "own.yml"), ("explain", good / "own.yml")):
        done = succeeded(rlmerge(*command, *own, "--json"))
        assert done.json
        assert "seen" in done.err
    done = rlmerge("merge", good / "own.yml", tmp_path / "out", *own, "--json", "--kernels", "numpy", "--threads", "2")
    assert succeeded(done).json["out"]
    assert done.err.count("seen") > 2


@pytest.mark.parametrize("code", ["0", "3", "'done'"])
def test_leaving_from_within_is_an_error(good, tmp_path, code):
    """A merge that ended in silence, with 0, would pass for a whole one."""
    file = plugin(tmp_path, CLIPPED.replace("    return base", f"    raise SystemExit({code})\n    return base"))
    done = rlmerge(
        "merge", good / "own.yml", tmp_path / "out", "--plugin", file, "--kernels", "numpy", "--threads", "2"
    )
    assert f"{file}:16: method 'clipped' at model." in refused(done)
    assert "SystemExit: " + code.strip("'") in done.err
    file = plugin(
        tmp_path, OWN.replace("        merged = super", f"        raise SystemExit({code})\n        merged = super")
    )
    parts = ["--base", good / "base", "--expert", good / "e0", "--method", "doubled", "--set", "weight=1"]
    done = rlmerge("merge", tmp_path / "other", *parts, "--plugin", file, "--kernels", "numpy", "--threads", "2")
    assert f"{file}:10: SystemExit: {code}".replace("'", "") in refused(done)


def test_not_a_number_is_laid_to_the_plugin(good, tmp_path):
    file = plugin(tmp_path, CLIPPED.replace("    return base", "    return base * np.nan\n    return base"))
    out = ("merge", good / "own.yml", tmp_path / "out", "--plugin", file, "--kernels", "numpy")
    with np.errstate(all="ignore"):
        assert "Check method 'clipped' of own.py, then the inputs." in refused(rlmerge(*out))


# ---- Files that are no plugins ----------------------------------------------------------------------------------

BAD = {
    "no python": ("def f(:\n", "bad.py:1: this is no Python"),
    "null byte": ("x = 1\0", "bad.py"),
    "an error": ("x = 1\ny = x / 0\n", "bad.py:2: the plugin cannot be run: ZeroDivisionError"),
    "the end": ("import sys\nsys.exit(0)\n", "bad.py:2: the plugin cannot be run: SystemExit"),
    "an import": ("import absent_package\n", "bad.py:1: the plugin cannot be run: ModuleNotFoundError"),
    "nothing": ("x = 1\n", "bad.py: defines no merge method: decorate a function with @method"),
    "a class": (OWN.replace("METHOD = Doubled()", ""), "bad.py: defines no merge method: write METHOD = Doubled()"),
    "taken name": (CLIPPED.replace('"clipped"', '"ties"'), "method 'ties' is there already, in rlmerge"),
    "strange name": (CLIPPED.replace('"clipped"', '"clip ped"'), "bad.py:6: method 'clip ped': a name has letters"),
    "no summary": (CLIPPED.replace('"sum of the weighted deltas, no change larger than a limit"', '""'), "`summary`"),
    "bare decorator": ("from rlmerge.plugins import method\n@method\ndef f(base, deltas): ...\n", "bad.py:2"),
    "no argument": (
        CLIPPED.replace("weight, limit):", "weight):"),
        "bad.py:6: clipped cannot be called with (base, del",
    ),
    "another argument": (CLIPPED.replace("limit):", "limit, more):"), "missing a required argument: 'more'"),
    "a key": (CLIPPED.replace('"limit"', '"seed"'), "parameter 'seed' has the name of a key of recipes"),
    "twice": (CLIPPED.replace('"limit"', '"weight"'), "a parameter cannot be called 'weight' twice"),
    "default": (CLIPPED.replace("0.125,", "0.0,"), "parameter 'limit': its default is none: expected a number > 0"),
    "kind": (CLIPPED.replace('"limit", "number"', '"limit", "float"'), "kind 'float' is none of number, integer"),
    "choice": (CLIPPED.replace('"limit", "number"', '"limit", "choice"'), "a choice has `choices`"),
    "meaning": (CLIPPED.replace('"largest change of a weight"', '""'), "its meaning is missing"),
    "sees": (CLIPPED.replace("    parameters=[", '    sees="rows",\n    parameters=['), "sees='rows'"),
    "models": (CLIPPED.replace("    parameters=[", "    models=(3, 2),\n    parameters=["), "it cannot take 3 to 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_plugin(case, tmp_path):
    text, words = BAD[case]
    with pytest.raises(PluginError) as caught:
        load_plugins(plugin(tmp_path, text, "bad.py"))
    assert words in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for file in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(PluginError, match="cannot be read"):
            load_plugins(file)


def test_two_plugins_of_one_name(tmp_path):
    one, other = plugin(tmp_path, CLIPPED), plugin(tmp_path, CLIPPED, "other.py")
    with pytest.raises(PluginError, match=r"other\.py: method 'clipped' is there already, in .*own\.py"):
        load_plugins(one, other)
    assert len(load_plugins(one, one)) == len(api.method_names()) + 1


def test_a_plugin_may_use_a_method_of_ours(tmp_path):
    text = "from rlmerge.methods import get_method\nTIES = get_method('ties')\n" + CLIPPED
    assert load_plugins(plugin(tmp_path, text)).own.keys() == {"clipped"}


@pytest.mark.parametrize("returned", ["None", "deltas", "base[:-1]", "base > 0", "base * 1j", "'words'"])
def test_what_is_returned_must_be_the_merged_values(tmp_path, returned):
    models(tmp_path)
    text = CLIPPED.replace("return base", f"return {returned}\n    return base")
    with pytest.raises(PluginError, match=r"own\.py:6: method 'clipped' at .* returned .*: it must return"):
        merge_values(recipe_of(tmp_path, "clipped", plugin(tmp_path, text)))


def test_the_base_is_not_written_into(tmp_path):
    models(tmp_path)
    text = CLIPPED.replace("    return base", "    base += 1\n    return base")
    with pytest.raises(PluginError, match=r"own\.py:16: .*read-only"):
        merge_values(recipe_of(tmp_path, "clipped", plugin(tmp_path, text)))
