"""Models by name: from the cache, downloaded after saying what, refused in one line where there is no network."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.log import Log
from groundup.stages.hub import is_hub_name, model_of_hub


def test_names_and_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("HuggingFaceTB/SmolLM-135M")
    assert not any(map(is_hub_name, ("model", "./a/b", "/a/b", "a/b/c", "../x/y", "a b/c", "")))
    (tmp_path / "own" / "model").mkdir(parents=True)
    assert not is_hub_name("own/model"), "what is here is taken"


class Hub:
    """A hub with one model."""

    def __init__(self, folder, names):
        self.folder, self.names, self.downloads = folder, names, []

    def snapshot_download(self, name, *, allow_patterns, local_files_only=False):
        if local_files_only and not any(self.folder.iterdir()):
            raise LocalEntryNotFoundError("not cached")
        if not local_files_only:
            self.downloads.append(name)
            for file in (name for name in self.names if "/" not in name):
                (self.folder / file).touch()
        return str(self.folder)

    def model_info(self, name, *, files_metadata):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file, size=500_000) for file in self.names])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(*names):
        hub = Hub(tmp_path, names)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
        return hub

    return make


def test_it_says_what_it_downloads_and_does_so_once(hub, tmp_path, capsys):
    made = hub("config.json", "model.safetensors", "tokenizer.json", "onnx/model.onnx", "pytorch_model.bin")
    assert model_of_hub("owner/model", Log()) == tmp_path
    assert "downloads 3 files, 1.5 MB, of https://huggingface.co/owner/model" in capsys.readouterr().out
    assert model_of_hub("owner/model", Log()) == tmp_path and made.downloads == ["owner/model"]
    assert capsys.readouterr().out == ""


SHARDED = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "model-00001-of-00002.safetensors": "",
    "model-00002-of-00002.safetensors": "",
    "model.safetensors.index.json": '{"weight_map": {"a": "model-00001-of-00002.safetensors", '
    '"b": "model-00002-of-00002.safetensors"}}',
}


@pytest.mark.parametrize("absent", [*SHARDED, "both of the last"])
def test_a_download_that_was_cut_is_no_model(hub, tmp_path, capsys, absent):
    """Whatever came last; a link to bytes that never came is none either."""
    gone = [absent] if absent in SHARDED else [*SHARDED][3:]
    for name in SHARDED.keys() - set(gone):
        (tmp_path / name).write_text(SHARDED[name])
    (tmp_path / gone[0]).symlink_to(tmp_path / "blobs" / "that.incomplete")
    made = hub(*SHARDED)
    is_index_only = gone == ["model.safetensors.index.json"]
    if not is_index_only:  # both shards are there, as their numbers tell
        (tmp_path / gone[0]).unlink()
        assert model_of_hub("owner/model", Log()) == tmp_path
        assert made.downloads == ["owner/model"]
        assert "the cache holds a part of it only" in capsys.readouterr().out
        for name in SHARDED:
            (tmp_path / name).write_text(SHARDED[name])
    assert model_of_hub("owner/model", Log()) == tmp_path
    assert len(made.downloads) == (0 if is_index_only else 1)


def test_a_model_of_pickles_is_refused_before_anything_is_downloaded(hub):
    made = hub("config.json", "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="E-CKPT-FORMAT"):
        model_of_hub("owner/model", Log())
    assert made.downloads == []


def test_without_a_network_it_is_one_line():
    with pytest.raises(ConfigError, match="E-HUB: neither a directory here nor to be had") as error:
        model_of_hub("owner/model-that-is-not-cached", Log())
    assert "\n" not in str(error.value) and error.value.exit_code == 2
