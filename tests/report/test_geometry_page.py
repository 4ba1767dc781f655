"""The page of `inspect`: what it says is what the document says, and it can be opened anywhere."""

from __future__ import annotations

import html
import re

import pytest
from tests.geometry.geometry_models import document, make_base, train, write
from tests.report.report_documents import large, small

pytest.importorskip("altair")

from rlmerge.figures import gathered
from rlmerge.report.geometry_page import geometry_page
from rlmerge.report.page import embedded, render


@pytest.fixture(scope="module")
def found():
    return small()


@pytest.fixture(scope="module")
def page(found):
    return geometry_page(found)


@pytest.fixture(scope="module")
def text(page):
    return render(page)


def figure(page, name):
    return next(one for one in page.figures if one.id == name)


def rows_of(chart):
    """The rows of a chart, wherever in it they are."""
    if "values" in chart.get("data", {}):
        return chart["data"]["values"]
    return next(iter(chart["datasets"].values()))


def test_the_page_carries_the_document(found, text):
    assert embedded(text, "numbers") == found


def test_the_page_loads_nothing(text):
    assert re.findall(r"https?://|//\w+\.\w+/|@import|url\(", text) == []
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {link[0] for link in links if link != "data:,"} == {"#"}
    ids = set(re.findall(r'id="([^"]*)"', text))
    assert {link[1:] for link in links if link.startswith("#")} <= ids


def test_every_chart_has_a_place_and_a_table(page, text):
    charts = embedded(text, "figures")
    assert len(charts) >= 7
    assert all("$schema" not in chart for chart in charts.values())
    for name in charts:
        assert f'id="chart-{name}"' in text
        assert len(figure(page, name).table) > 1, name


def test_the_map_has_every_tensor(found, page):
    rows = {
        (row["expert"], row["layer"], row["module"]): row["value"]
        for row in rows_of(figure(page, "map").chart)
        if row["measure"] == "weights changed"
    }
    tensors = found["coordinates"]["tensors"]
    assert len(rows) == 2 * len(tensors) == 12
    names = {"model.norm.weight": ("–", "norm"), "model.layers.1.mlp.up_proj.weight": ("1", "mlp.up_proj")}
    for tensor in tensors:
        if tensor["name"] in names:
            for key in ("a", "b"):
                assert rows[(key, *names[tensor["name"]])] == pytest.approx(tensor["experts"][key]["support"], rel=1e-5)


def test_sentences_quote_the_document(found, page):
    total = found["coordinates"]["total"]
    pair = total["pairs"][0]
    said = " ".join(page.summary)
    assert f"a changed {100 * total['experts']['a']['support']:.1f} % of the weights" in said
    assert f"cosine {pair['cosine']:.3g}" in said
    null = total["null"]["pairs"][0]["conflict_overlap"]
    assert f"where the null model has {100 * null:.1f} %" in figure(page, "pairs").says
    survivals = [one["survival"] for one in found["storage"]["merges"]]
    assert f"{100 * min(survivals):.1f} %" in figure(page, "storage").says
    assert found["verdict"]["recommended"]["recipe"] == figure(page, "recipe").code
    assert page.warnings == tuple(gathered(found["verdict"]["warnings"], {}))


def test_pairs_have_the_null_beside_them(found, page):
    rows = [row for row in rows_of(figure(page, "pairs").chart) if row["measure"] == "Jaccard"]
    null = found["coordinates"]["total"]["null"]["pairs"][0]["jaccard"]
    assert [row["null"] for row in rows] == [pytest.approx(null, rel=1e-5)]


def test_the_matrix_of_experts_is_symmetric():
    found = small(("a", "b", "c"))
    chart = figure(geometry_page(found), "matrix").chart
    assert chart["encoding"]["x"]["sort"] == chart["encoding"]["y"]["sort"] == ["a", "b", "c"]
    cosines = {(row["expert"], row["other"]): row["value"] for row in rows_of(chart) if row["measure"] == "cosine"}
    assert len(cosines) == 6
    for pair in found["coordinates"]["total"]["pairs"]:
        assert cosines[pair["a"], pair["b"]] == cosines[pair["b"], pair["a"]] == pytest.approx(pair["cosine"], rel=1e-5)


def test_steps_begin_with_one_and_end_with_the_longest(found, page):
    """What storing an adapter would lose has 0 steps; of stored experts there is no such thing."""
    labels = [row[1] for row in figure(page, "steps").table[1:]]
    assert labels[0] == "1"
    assert "0" not in labels
    assert "0 to -1" not in labels
    found["coordinates"]["total"]["experts"]["a"]["steps"]["share"][0] = 0.25
    try:
        assert figure(geometry_page(found), "steps").table[1][1:] == ["0", "25.0 %"]
    finally:
        found["coordinates"]["total"]["experts"]["a"]["steps"]["share"][0] = 0.0


def test_settings_of_merges_are_short():
    found = small(("a", "b", "c"))
    labels = {row["merge"] for row in rows_of(figure(geometry_page(found), "storage").chart)}
    assert {"average (lambda 0.3333)", "ties (density 0.2)"} <= labels


@pytest.mark.parametrize("options", [{"null": False, "storage": False}, {"spectra": True}, {"trajectory": True}])
def test_what_was_not_measured_is_not_on_the_page(options):
    found = small(**options)
    page = geometry_page(found, "t")
    titles = [section.title for section in page.sections]
    assert ("Spectra" in titles) == ("spectra" in found)
    assert ("What a stored merge keeps" in titles) == ("storage" in found)
    assert render(page).count("<figure") == len(page.figures)


def test_one_expert_has_no_pairs():
    page = geometry_page(small(("a",)))
    assert page.title == "What training did to a"
    assert "Between experts" not in [section.title for section in page.sections]


def test_an_expert_that_changed_nothing_has_a_page(tmp_path):
    base = make_base()
    found = document(write(tmp_path, base, {"same": base, "other": train(base, 1)}))
    page = geometry_page(found)
    assert "same changed 0.0 % of the weights" in " ".join(page.summary)
    assert "0.0 %" in figure(page, "support").says
    alone = geometry_page(document(write(tmp_path / "alone", base, {"same": base})))
    assert figure(alone, "storage").says == "No expert changed anything."
    assert render(alone)


@pytest.mark.long
def test_a_large_model_fits():
    """36 layers, three experts, spectra of every matrix: at most 5 MB."""
    found = large()
    assert len(found["coordinates"]["tensors"]) == 1 + 36 * 9
    text = render(geometry_page(found))
    assert len(text.encode()) < 5e6
    assert embedded(text, "numbers") == found
    assert "more rows are in the numbers of this page" in text


def test_names_cannot_be_code():
    name = '</script><img src=x onerror="alert(1)">'
    found = renamed(small(("victim", "b")), {"victim": name})
    text = render(geometry_page(found))
    assert "<img" not in text
    assert html.escape(name.rsplit("/")[-1]) in text
    assert embedded(text, "numbers") == found
    assert text.count("</script>") == text.count("<script") == 4


def renamed(value, keys):
    """A document whose experts have other keys."""
    if isinstance(value, dict):
        return {keys.get(key, key): renamed(part, keys) for key, part in value.items()}
    if isinstance(value, list):
        return [renamed(part, keys) for part in value]
    return keys.get(value, value) if isinstance(value, str) else value


def test_experts_of_a_mixture_share_a_cell():
    found = small()
    tensor = next(t for t in found["coordinates"]["tensors"] if t["name"] == "model.layers.0.mlp.up_proj.weight")
    other = {**tensor, "experts": {key: {**one, "support": 0.0} for key, one in tensor["experts"].items()}}
    tensor["name"], other["name"] = (f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in (0, 1))
    found["coordinates"]["tensors"].append(other)
    rows = [
        row for row in rows_of(figure(geometry_page(found), "map").chart) if row["module"] == "mlp.experts.*.up_proj"
    ]
    shares = [row["value"] for row in rows if (row["measure"], row["expert"]) == ("weights changed", "a")]
    assert shares == [pytest.approx(tensor["experts"]["a"]["support"] / 2, rel=1e-5)]
