"""Models of the hub: from the cache, or fetched by huggingface_hub from a server that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.checkpoint.hub_server import Hub, serving
from tests.cli.command_line import FIRST, SECOND, TOKENIZER, good_set, refused, rlmerge, succeeded

from rlmerge.checkpoint import download as module
from rlmerge.checkpoint.download import download
from rlmerge.checkpoint.hub import cached_snapshot, has_headers_only, lacking, origin, split_id
from rlmerge.downloads import find_folder, find_model
from rlmerge.errors import DownloadError, RecipeError
from rlmerge.recipe import Recipe

pytest.importorskip("huggingface_hub")
RECIPE = """\
merge_method: sar
base_model: lab/base
models:
  - model: lab/e0@v1
    name: e0
    fisher: lab/f0
  - model: lab/e1
    name: e1
    fisher: lab/f1
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The good set of the command line's tests on a hub, an empty cache, a recipe of ids."""
    import huggingface_hub
    from huggingface_hub import constants

    local = tmp_path / "local"
    good_set(local)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    with serving() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name in ("base", "e1", "f0", "f1"):
            made.add(f"lab/{name}", local / name)
        made.add("lab/e0", local / "e1")
        made.add("lab/e0", local / "e0", "v1")
        yield made
        huggingface_hub.close_session()
    assert not made.told, "the token went to where the weights lie"


def contents(folder: Path) -> dict[str, bytes]:
    said = {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in ("run.log", "README.md")}
    return {name: data for name, data in said.items() if name != "rlmerge.json"}


def test_a_merge_of_ids_is_the_merge_of_folders(hub: Hub, tmp_path: Path) -> None:
    """Headers first, then weights, once; commits in what is written; afterwards without the flag and the network."""
    for name in ("pytorch_model.bin", "model.gguf", "optimizer.pt", "onnx/model.onnx", "onnx/config.json"):
        (tmp_path / "local/base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "local/base" / name).write_bytes(b"x")
    message = refused(rlmerge("merge", "recipe.yml", "out"))
    assert "recipe.yml:4: models[0].model: 'lab/e0@v1'" in message
    assert "--download" in message
    assert "hf download lab/e0 --revision v1" in message
    assert not hub.asked
    done = succeeded(rlmerge("merge", "recipe.yml", "out", "--download", "--kernels", "numpy"))
    assert "headers of 2 file(s)" in done.err
    succeeded(rlmerge("merge", "local/recipe.yml", "plain", "--kernels", "numpy", "--set", "density=0.8"))
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "plain").keys() - {"onnx"}
    words = (tmp_path / "out/model.safetensors").read_bytes()
    assert words == (tmp_path / "plain/model.safetensors").read_bytes()
    asked = {path.rsplit("/", 1)[-1] for _, path, _ in hub.asked}
    assert not asked & {"pytorch_model.bin", "model.gguf", "optimizer.pt", "model.onnx"}
    commit = hub.repositories["lab/e0"].revisions["v1"]
    said = json.loads((tmp_path / "out/rlmerge.json").read_text())
    assert next(entry for entry in said["inputs"] if entry["role"] == "e0")["commits"] == {"lab/e0": commit}
    card = (tmp_path / "out/README.md").read_text()
    assert f"- `lab/e0`: `{commit}`" in card
    assert "\n- lab/e0\n" in card.split("---")[1]
    hub.asked.clear()
    succeeded(rlmerge("merge", "recipe.yml", "again", "--kernels", "numpy"))
    assert (tmp_path / "again/model.safetensors").read_bytes() == words
    assert not hub.asked


def test_check_fetches_headers_only(hub: Hub, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FIRST", 64)  # a header is longer
        done = succeeded(rlmerge("check", "recipe.yml", "--download"))
    assert "only headers are here of" in done.err
    assert "6 tensors merged" in done.out
    size = (tmp_path / "local/e1/model.safetensors").stat().st_size
    spans = [tuple(map(int, given.removeprefix("bytes=").split("-"))) for _, given in hub.weights()]
    assert spans
    assert all(last < size // 2 for _, last in spans)
    assert not any((tmp_path / "cache").rglob("*.safetensors"))
    folder = download("lab/e1", headers=True)
    assert has_headers_only(folder)
    assert (folder / "model.safetensors").stat().st_size == size
    assert "does not have it" in refused(rlmerge("merge", "recipe.yml", "out"))  # what is there is no model
    groups = succeeded(rlmerge("explain", "recipe.yml", "--download", "--json")).json
    assert sum(group["count"] for group in groups) == 6


def test_what_headers_show_is_said_before_weights_move(hub: Hub, tmp_path: Path) -> None:
    write_tensors(tmp_path / "local/e1/model.safetensors", {"model.norm.weight": np.ones(9)}, "BF16")
    before = len(hub.asked)
    done = rlmerge("merge", "recipe.yml", "out", "--download")
    assert done.code == 2
    assert "6 tensors do not match" in done.err
    assert len(hub.asked) > before
    assert not any((tmp_path / "cache").rglob("*.safetensors"))
    hub.ranges = False  # a server that sends whole files is listened to for a moment only
    assert "6 tensors do not match" in refused(rlmerge("check", "recipe.yml", "--download"))


def large(hub: Hub, folder: Path, size: int = 40_000) -> Path:
    values = np.random.default_rng(0).standard_normal(size // 4).astype(np.float32)
    write_model(folder, {"w": values}, {})
    hub.add("lab/large", folder)
    return folder / "model.safetensors"


def test_a_broken_connection_is_continued(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    file = large(hub, tmp_path / "large")
    hub.cut, hub.cuts = 10_000, 2
    folder = download("lab/large")
    assert (folder / "model.safetensors").read_bytes() == file.read_bytes()
    assert [given for method, given in hub.weights() if method == "GET"] == ["", "bytes=10000-", "bytes=20000-"]
    assert origin(folder) == ("lab/large", hub.repositories["lab/large"].revisions["main"])
    hub.asked.clear()
    assert download("lab/large") == folder
    assert not hub.weights()


def test_a_download_that_was_given_up_is_continued(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    file = large(hub, tmp_path / "large")
    hub.cut, hub.cuts = 500, 99  # less than a chunk arrives, again and again
    with pytest.raises(DownloadError, match="the same command continues"):
        download("lab/large")
    hub.cuts, hub.cut = 1, 12_000
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: (_ for _ in ()).throw(OSError("x")))
    with pytest.raises(DownloadError, match="What has arrived is kept"):
        download("lab/large")
    assert cached_snapshot("lab/large", None) is None
    hub.asked.clear()
    told: list[str] = []
    folder = download("lab/large", tell=told.append)
    assert ("GET", "bytes=12000-") in hub.weights()
    assert "continued after 12 kB" in told[0]
    assert (folder / "model.safetensors").read_bytes() == file.read_bytes()
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_killed_download_is_continued(hub: Hub, tmp_path: Path) -> None:
    """A process of its own, killed with half a file on disk."""
    file = large(hub, tmp_path / "large", 24_000_000)  # what arrives is written in pieces of 10 MiB
    hub.slow = threading.Event()
    code = "import sys; from rlmerge.checkpoint.download import download; download('lab/large')"
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ), cwd=tmp_path)
    assert hub.reached.wait(60)
    for _ in range(200):
        found = list((tmp_path / "cache").rglob("*.rlmerge.incomplete"))
        if found and found[0].stat().st_size >= 10 * 2**20:
            break
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.slow.set()
    hub.slow = None
    (part,) = (tmp_path / "cache").rglob("*.rlmerge.incomplete")
    have = part.stat().st_size
    assert have >= 10_000_000
    hub.asked.clear()
    folder = download("lab/large")
    assert [given for method, given in hub.weights() if method == "GET"] == [f"bytes={have}-"]
    assert (folder / "model.safetensors").read_bytes() == file.read_bytes()


def test_bytes_that_are_not_the_hubs_are_refused(hub: Hub, tmp_path: Path) -> None:
    file = large(hub, tmp_path / "large")
    hub.spoiled = True
    with pytest.raises(DownloadError, match="damaged on the way"):
        download("lab/large")
    hub.spoiled = False
    assert (download("lab/large") / "model.safetensors").read_bytes() == file.read_bytes()


def test_who_may_not(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large(hub, tmp_path / "large")
    hub.repositories["lab/large"].gate = "gated"
    download("lab/large", headers=True)  # with the token
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    for gate, part in [("gated", "is gated. Accept its conditions at https://huggingface.co/lab/large"),
                       ("private", "the hub shows no such model")]:  # fmt: skip
        hub.repositories["lab/large"].gate = gate
        with pytest.raises(DownloadError, match=part):
            download("lab/large")
    with pytest.raises(DownloadError, match="shows no such model"):
        download("lab/nothing")
    with pytest.raises(DownloadError, match="lab/base@v9: this model has no such revision"):
        download("lab/base", "v9")


def test_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    download("lab/base")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1 forbids it" in refused(rlmerge("check", "recipe.yml", "--download"))
    assert not hub.asked
    assert find_folder("lab/base") == cached_snapshot("lab/base", "main")
    # a recipe of folders needs neither flag nor network
    succeeded(rlmerge("check", "local/recipe.yml", "--download"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"lab/e1: cannot be fetched \(ConnectError"):
        download("lab/e1")


def test_a_model_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"x")
    hub.add("lab/pickled", tmp_path / "pickled")
    with pytest.raises(DownloadError, match=r"no safetensors \(only pytorch_model.bin\)"):
        download("lab/pickled")


def test_a_snapshot_of_some_files_says_what_it_lacks(hub: Hub, tmp_path: Path) -> None:
    folder = download("lab/base")
    assert lacking(folder) == ""
    (folder / SECOND).unlink()
    assert lacking(folder) == SECOND
    (folder / FIRST).unlink()
    with pytest.raises(RecipeError, match=r"it lacks model-00001-of-00002\.safetensors and 1 more files"):
        find_folder("lab/base")
    hub.asked.clear()
    assert lacking(download("lab/base")) == ""
    assert not hub.weights()  # the blobs were there


def test_commands_take_ids(hub: Hub, tmp_path: Path) -> None:
    """Adapters and packs are fetched whole even by `check`, which looks into them; ids stand on both sides of a '+'."""
    succeeded(rlmerge("pack", "lab/e1", "--base", "lab/base", "-o", "pack", "--download"))
    hub.add("lab/pack", tmp_path / "pack")
    module_name = "base_model.model.model.layers.0.q_proj"
    shapes: dict[str, Any] = {"A": (2, 8), "B": (8, 2)}
    pair = {f"{module_name}.lora_{side}.weight": np.ones(shape) for side, shape in shapes.items()}
    write_tensors(tmp_path / "lora/adapter_model.safetensors", pair)
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    hub.add("lab/lora", tmp_path / "lora")
    models = "[{model: lab/e0@v1+lab/lora}, {model: lab/pack}]"
    recipe = f"merge_method: ties\nbase_model: lab/base\nmodels: {models}\nparameters: {{weight: 1, density: 0.5}}\n"
    (tmp_path / "both.yml").write_text(recipe)
    (tmp_path / "cache").rename(tmp_path / "other")
    succeeded(rlmerge("check", "both.yml", "--download"))
    succeeded(rlmerge("merge", "both.yml", "out", "--download", "--kernels", "numpy"))
    card = (tmp_path / "out/README.md").read_text().split("---")[1]
    assert "base_model:\n- lab/base\n- lab/e0\n- lab/lora\n- lab/pack\n" in card
    found = find_model("lab/e0@v1+lab/lora")
    assert isinstance(found, Recipe)
    with pytest.raises(RecipeError, match="lies in no folder"):
        find_folder("lab/e0@v1+lab/lora")
    with pytest.raises(RecipeError, match="MODEL: 'lab/nowhere' does not exist"):
        find_folder("lab/nowhere")


@pytest.mark.parametrize("key", ["tokenizer_source: lab/lender", "tokenizer: {source: lab/lender@v2}"])
def test_who_lends_a_tokenizer_is_fetched_without_weights(hub: Hub, tmp_path: Path, key: str) -> None:
    """Into the cache, too, where another merge finds it without the flag; `check` and `merge` alike."""
    said = {**TOKENIZER, "added_tokens": [{"id": 3, "content": "<call>", "special": True}]}
    (tmp_path / "lender").mkdir()
    (tmp_path / "lender/tokenizer.json").write_text(json.dumps(said))
    write_tensors(tmp_path / "lender/model.safetensors", {"model.norm.weight": np.ones(9)})
    hub.add("lab/lender", tmp_path / "lender")
    hub.add("lab/lender", tmp_path / "lender", "v2")
    models = "[{model: local/e0, parameters: {weight: 1}}]"
    (tmp_path / "lent.yml").write_text(f"merge_method: linear\nmodels: {models}\n{key}\n")
    assert "Add --download" in refused(rlmerge("check", "lent.yml"))
    succeeded(rlmerge("check", "lent.yml", "--download"))
    succeeded(rlmerge("merge", "lent.yml", "out", "--download", "--kernels", "numpy"))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "lender/tokenizer.json").read_bytes()
    assert not hub.weights()
    hub.asked.clear()
    succeeded(rlmerge("check", "lent.yml"))
    assert not hub.asked
    with pytest.raises(RecipeError, match="it lacks every safetensors file"):
        find_folder("lab/lender" + ("@v2" if "@" in key else ""))
    (tmp_path / "nothing").mkdir()
    hub.add("lab/nothing", tmp_path / "nothing")
    with pytest.raises(DownloadError, match="holds nothing that a merge reads"):
        download("lab/nothing", small=True)


def test_stages_of_ids(hub: Hub, tmp_path: Path) -> None:
    """Every document's models are fetched; the card has those that were there before."""
    first = "name: both\nmerge_method: linear\nmodels: [{model: lab/e0@v1}, {model: lab/e1}]\nparameters: {weight: 1}\n"
    second = (
        "merge_method: ties\nbase_model: lab/base\nmodels: [{model: both}]\nparameters: {weight: 1, density: 0.5}\n"
    )
    (tmp_path / "stages.yml").write_text(f"{first}---\n{second}")
    done = succeeded(rlmerge("check", "stages.yml", "--download"))
    assert "only headers are here of lab/e0@v1, lab/e1" in done.err
    succeeded(rlmerge("merge", "stages.yml", "out", "--download", "--kernels", "numpy"))
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model:\n- lab/base\n- lab/e0\n- lab/e1\n" in card.split("---")[1]
    assert hub.repositories["lab/e0"].revisions["v1"] in card


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
        ("owner/name@v1.0+cu", ("owner/name", "v1.0+cu")),
        ("./owner/name", None),
        ("owner/name/more", None),
        ("owner/name@../../x", None),
        ("name", None),
        ("", None),
    ],
)
def test_ids(text: str, found: Any) -> None:
    assert split_id(text) == found
