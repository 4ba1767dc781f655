"""Recipe files of several documents: their order, what they refer to, `--set`, and every mistake with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlmerge
from rlmerge.errors import RecipeError
from rlmerge.stages import Stages, parse_stages

OUTPUT = """\
merge_method: linear
models:
  - {model: both, parameters: {weight: 1}}
  - {model: first, parameters: {weight: 1}}
"""
BOTH = """\
name: both
merge_method: ties
base_model: first
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
"""
FIRST = """\
name: first
merge_method: task_arithmetic
base_model: base
models:
  - {model: c, parameters: {weight: 1}}
"""


def parse(*documents: str, folder: Path | None = None) -> Stages:
    return parse_stages("---\n".join(documents), "r.yml", folder)


def test_documents_come_after_what_they_are_made_of():
    for documents in ((OUTPUT, BOTH, FIRST), (FIRST, BOTH, OUTPUT), (BOTH, OUTPUT, FIRST)):
        stages = parse(*documents)
        assert stages.names == ("first", "both")
        assert stages.final.name is None


def test_the_output_may_have_a_name_and_stand_anywhere():
    stages = parse(f"name: the title, of all\n{OUTPUT}", FIRST, BOTH)
    assert stages.final.name == "the title, of all"
    assert stages.names == ("first", "both")


def test_independent_stages_keep_the_order_of_the_file():
    one, other = (f"name: {name}\n" + FIRST.partition("\n")[2] for name in "zy")
    use = "merge_method: linear\nmodels: [{model: z, parameters: {weight: 1}}, {model: y, parameters: {weight: 1}}]\n"
    assert parse(one, other, use).names == ("z", "y")


def test_stages_know_their_folders_and_what_they_are_made_of(tmp_path):
    for name in ("a", "b", "c", "base"):
        (tmp_path / name).mkdir()
    final = parse(OUTPUT, BOTH, FIRST, folder=tmp_path).at(tmp_path / "place").final
    assert final.model_paths == {"both": tmp_path / "place/both", "first": tmp_path / "place/first"}
    assert list(final.all_stages) == ["first", "both"]
    assert final.all_stages["both"][1].base_path == tmp_path / "place/first"
    # the base of the base before what was added to it
    assert final.ancestors == {name: tmp_path / name for name in ("base", "c", "a", "b")}
    assert final.with_settings({"seed": 3}).model_paths == final.model_paths


def test_an_adapter_stands_on_a_stage_too(tmp_path):
    for name in ("lora", "c", "base"):
        (tmp_path / name).mkdir()
    found = parse(OUTPUT.replace("both", "first+lora"), FIRST, folder=tmp_path)
    assert found.names == ("first",)
    final = found.at(tmp_path / "place").final
    assert final.model_paths == dict.fromkeys(("first", "first+lora"), tmp_path / "place/first")
    assert final.adapter_paths == {"first": None, "first+lora": tmp_path / "lora"}
    assert list(final.ancestors) == ["base", "c", "lora"]
    circle = FIRST.replace("model: c", "model: first+lora")
    with pytest.raises(RecipeError, match="in a circle: first → first"):
        parse(OUTPUT.replace("both", "c"), circle, folder=tmp_path)


def test_a_base_with_an_adapter_is_a_stage_of_its_own(tmp_path):
    """Once for all documents; on a stage, after it; under a name that is free."""
    for name in ("lora", "c", "base", "base-with-lora"):
        (tmp_path / name).mkdir()
    on_both = OUTPUT.replace("linear", "task_arithmetic\nbase_model: first+lora").replace("both", "base+lora")
    found = parse(FIRST.replace("base_model: base", "base_model: base+lora"), on_both, folder=tmp_path)
    assert found.names == ("base-with-lora-2", "first", "first-with-lora")
    made, first, on_first, final = found.at(tmp_path / "place").recipes
    assert (made.merge_method, made.model_paths, made.adapter_paths) == (
        "passthrough", {"base+lora": tmp_path / "base"}, {"base+lora": tmp_path / "lora"},
    )  # fmt: skip
    assert first.base_path == tmp_path / "place/base-with-lora-2"
    assert on_first.model_paths == {"first+lora": tmp_path / "place/first"}
    assert final.base_path == tmp_path / "place/first-with-lora"
    # a model is another thing: its update stays exact, unless the stage is there anyway
    assert final.model_paths["base+lora"] == tmp_path / "place/base-with-lora-2"
    assert list(final.ancestors) == ["base", "lora", "c"]
    assert found.with_settings([{"first.seed": 4}])[0].recipes[1].seed == 4


def test_mergekits_way_to_write_a_path_refers_to_a_stage_too():
    document = BOTH.replace("base_model: first", "base_model: {model: {path: first}}")
    assert parse(OUTPUT, document, FIRST).recipes[1].base_path is not None


def test_one_document_is_one_recipe(tmp_path):
    for text in (FIRST, f"---\n{FIRST}", f"{FIRST}---\n", f"{FIRST}---\n# nothing\n"):
        (tmp_path / "r.yml").write_text(text)
        assert rlmerge.load_stages(tmp_path / "r.yml").recipes == (rlmerge.load_recipe(tmp_path / "r.yml"),)


def test_who_wants_one_recipe_is_told_of_load_stages(tmp_path):
    (tmp_path / "r.yml").write_text(f"{FIRST}---\n{OUTPUT.replace('both', 'd')}")
    with pytest.raises(RecipeError, match=r"r\.yml:7: a second document starts here.*load_stages"):
        rlmerge.load_recipe(tmp_path / "r.yml")
    with pytest.raises(RecipeError, match="load_stages"):
        next(rlmerge.merge(tmp_path / "r.yml"))


# ---- --set ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_outputs_or_those_of_a_named_document():
    stages, sweep = parse(OUTPUT, BOTH, FIRST).with_settings([{"seed": 3, "both.lambda": 0.5, "first.seed": 4}])
    assert sweep == []
    assert [recipe.seed for recipe in stages.recipes] == [4, 0, 3]
    assert stages.recipes[1].parameters["lambda"] == 0.5
    assert stages.final.stages["both"][1] == stages.recipes[1]  # what refers to it sees it so, too


def test_only_the_output_is_swept():
    points = [{"normalize": False, "first.seed": 4}, {"normalize": True, "first.seed": 4}]
    stages, sweep = parse(OUTPUT, BOTH, FIRST).with_settings(points)
    assert sweep == [{"normalize": False}, {"normalize": True}]
    assert stages.recipes[0].seed == 4
    with pytest.raises(RecipeError, match=r"--set first\.seed: only the output can be swept"):
        stages.with_settings([{"first.seed": 4}, {"first.seed": 5}])


def test_the_outputs_own_name_works_too():
    stages = parse(f"name: all\n{OUTPUT}", BOTH, FIRST).with_settings([{"all.seed": 3, "dtype": "float32"}])[0]
    assert (stages.final.seed, stages.final.dtype) == (3, "float32")


def test_settings_of_nothing_are_refused():
    stages = parse(OUTPUT, BOTH, FIRST)
    with pytest.raises(RecipeError, match=r"--set fist.seed: no document is called 'fist'. Did you mean 'first'\?"):
        stages.with_settings([{"fist.seed": 4}])
    with pytest.raises(RecipeError, match=r"--set density.*unknown parameter of method 'task_arithmetic'"):
        stages.with_settings([{"first.density": 4}])


# ---- Mistakes ------------------------------------------------------------------------------------------------------

OTHER = OUTPUT.replace("both", "a").replace("first", "b")
MISTAKES = {
    "one name twice": ((OUTPUT, BOTH, FIRST, FIRST), ["r.yml:19: name: 'first' is the name of ", "at r.yml:13, too"]),
    "the output has a stage's name": ((FIRST, "name: first\n" + OUTPUT.replace("both", "a")), ["r.yml:7: name: "]),
    "itself": (
        (FIRST.replace("base_model: base", "base_model: first"), OUTPUT.replace("both", "a")),
        ["r.yml:3: base_model: documents refer to each other in a circle: first → first."],
    ),
    "a circle": (
        (OUTPUT, BOTH, FIRST.replace("model: c", "model: both")),
        ["r.yml:8: base_model: ", "in a circle: both → first → both."],
    ),
    "a circle of all": (
        (BOTH, FIRST.replace("model: c", "model: both")),
        ["in a circle: both → first → both."],
    ),
    "two outputs": ((OUTPUT, BOTH, FIRST, OTHER), ["r.yml:1 and r.yml:19: no other document refers to these"]),
    "a stage for nothing": ((FIRST, OTHER), ["r.yml:1 ('first') and r.yml:7: no other document refers"]),
    "no name": ((FIRST.partition("\n")[2], OTHER), ["r.yml:1 and r.yml:6"]),
    "a path as name": (
        (OUTPUT.replace("both", "out/x"), FIRST, BOTH.replace("both", "out/x")),
        ["r.yml:12: name: 'out/x' cannot be the folder of a stage"],
    ),
    "a hidden name": ((OUTPUT.replace("both", ".x"), FIRST, BOTH.replace("both", ".x")), ["'.x' cannot be"]),
    "our own name": (
        (OUTPUT.replace("both", "stages.json"), FIRST, BOTH.replace("both", "stages.json")),
        ["'stages.json' cannot be the folder", "another word"],
    ),
    "unfinished": (
        (OUTPUT.replace("both", "x.unfinished"), FIRST, BOTH.replace("both", "x.unfinished")),
        ["another word"],
    ),
    "no such document": (
        (OUTPUT.replace("both", "frist"), FIRST),
        ["r.yml:3: models[0].model: 'frist' is no path and no document. Did you mean 'first'?"],
    ),
    "mistakes in two documents": (
        (OUTPUT.replace("linear", "liner"), BOTH + "dtpye: x\n", FIRST),
        ["r.yml:1: merge_method: there is no merge method 'liner'", "r.yml:12: dtpye: unknown key"],
    ),
    "not yaml, later": ((OUTPUT, "a: [1\n"), ["r.yml:7: this is no recipe in YAML"]),
    "a list, later": ((OUTPUT, "- a\n"), ["r.yml: a recipe is a mapping"]),
    "many values": ((OUTPUT, "x: &a [" + "1," * 9000 + "]\ny: [*a, *a]\n"), ["more than 20000 values"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path):
    documents, expected = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        parse(*documents, folder=tmp_path)
    for words in expected:
        assert words in str(caught.value)


@pytest.mark.parametrize("where", ["folder", "cwd"])
def test_a_name_that_hides_a_path(tmp_path, monkeypatch, where):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / where / "first").mkdir()
    with pytest.raises(RecipeError, match=r"r\.yml:13: name: 'first' is also the path .*first"):
        parse(OUTPUT, BOTH, FIRST, folder=tmp_path / "folder")


def test_the_outputs_name_may_be_a_path(tmp_path):
    (tmp_path / "first").mkdir()
    assert parse(f"name: first\n{OTHER.replace('model: a', 'model: x')}", "name: x\n" + FIRST.partition("\n")[2],
                 folder=tmp_path).names == ("x",)  # fmt: skip
