"""Files of strangers: none runs anything, none writes outside its folder, each is refused in one line."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml

from groundup.base.artifact import read_manifest, verify
from groundup.base.errors import GroundupError
from groundup.base.files import sha256_of
from groundup.proof.trial_recipe import trial_sections

pytestmark = pytest.mark.end_to_end


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def as_pickle(marker: Path, protocol: int) -> bytes:
    return pickle.dumps({"model": Touches(marker)}, protocol=protocol)


def as_torch_zip(marker: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", as_pickle(marker, 2))
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


PAYLOADS = {
    "protocol 2": lambda marker: as_pickle(marker, 2),
    "protocol 4": lambda marker: as_pickle(marker, 4),
    "torch's zip": as_torch_zip,
}


def test_the_payloads_would_run(tmp_path):
    for number, payload in enumerate((as_pickle(tmp_path / "0", 0), as_pickle(tmp_path / "1", 4))):
        pickle.loads(payload)
        assert (tmp_path / str(number)).exists()


def answer(trials, *command):
    """A command that must be refused in one line, without a traceback."""
    ended = trials.run(*command, limit_seconds=60)
    lines = [line for line in ended.err.splitlines() if not line.startswith("WARNING")]
    assert ended.status in (2, 3, 4) and len(lines) == 1 and lines[0].startswith("ERROR E-"), ended
    return lines[0]


@pytest.fixture
def model(engine, tmp_path):
    """A good model of the test's own."""
    return Path(shutil.copytree(engine.unbroken / "pretrain" / "model", tmp_path / "model"))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(
    "name", ["model.pt", "model.pth", "pytorch_model.bin", "model.ckpt", "model.pkl", "model", "model.safetensors"]
)
def test_a_pickle_given_as_a_model(trials, tmp_path, name, payload):
    marker, path = tmp_path / "marker", tmp_path / name
    path.write_bytes(PAYLOADS[payload](marker))
    assert "E-CKPT-FORMAT: pickle refused" in answer(trials, "generate", path, "x")
    assert not marker.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "weights.pkl"),
        *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    ],
)
def test_a_pickle_in_a_model_s_folder(trials, model, tmp_path, name, payload):
    marker = tmp_path / "marker"
    if not name.endswith(".json"):
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(PAYLOADS[payload](marker))
    assert "E-CKPT-FORMAT: pickle refused" in answer(trials, "generate", model, "x")
    assert not marker.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_pickle_given_to_the_converter(engine, trials, tmp_path, payload):
    """The one command that reads pickles reads tensors only."""
    marker, path = tmp_path / "marker", tmp_path / "full_sft_512.pth"
    path.write_bytes(PAYLOADS[payload](marker))
    line = answer(trials, "convert", path, "--to", tmp_path / "new", "--tokenizer", engine.unbroken / "tokenizer")
    assert "E-CKPT-FORMAT: pickle refused, it cannot be read as tensors alone" in line
    assert not marker.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"])
def test_a_pickle_as_an_adapter(engine, trials, tmp_path, name, payload):
    marker, adapter = tmp_path / "marker", tmp_path / "adapter"
    shutil.copytree(engine.unbroken / "lora" / "adapter", adapter)
    if name.startswith("adapter_model"):
        (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(PAYLOADS[payload](marker))
    line = answer(trials, "merge", adapter, "--base", engine.unbroken / "sft/model", "--to", tmp_path / "out")
    assert "E-CKPT-FORMAT: pickle refused" in line
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_pickle_as_a_tokenizer_or_template(engine, trials, tmp_path, write_recipe, name, payload):
    marker, folder = tmp_path / "marker", tmp_path / "tokenizer"
    shutil.copytree(engine.unbroken / "tokenizer", folder)
    (folder / name).write_bytes(PAYLOADS[payload](marker))
    sections = trial_sections(engine.folder.parent) | {"tokenizer": {"path": str(folder)}}
    run = engine.fresh_run("pretrain", "tokenizer-pickle")
    shutil.rmtree(run / "tokenizer")
    recipe = write_recipe({name: sections[name] for name in ("corpus", "tokenizer")} | {"name": "run"})
    assert "E-CKPT-FORMAT: pickle refused" in answer(trials, "tokenizer", recipe, "--runs-dir", run.parent)
    assert not marker.exists()


@pytest.mark.parametrize("payload", ["protocol 4", "torch's zip"])
@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors", "MANIFEST.json"])
def test_a_pickle_in_a_checkpoint(engine, trials, tmp_path, name, payload):
    marker = tmp_path / "marker"
    run = engine.fresh_run("pretrain", "checkpoint-pickle")
    metrics = run / ".attempts" / "pretrain" / "metrics.jsonl"
    sends = [{"signal": "SIGKILL", "lines_of": str(metrics), "lines": 8}]  # past step 6, whose save waits for step 3's
    trials.run(*engine.command("pretrain", run.parent), sends=sends)
    folders = [path.parent for path in (run / ".attempts/pretrain/checkpoints").glob("*/*/MANIFEST.json")]
    assert folders, "there is no checkpoint to spoil"
    for folder in folders:
        (folder / name).write_bytes(PAYLOADS[payload](marker))
        manifest = folder / "MANIFEST.json"
        if name != manifest.name:  # even one that is listed as it stands there
            values = json.loads(manifest.read_bytes())
            if name in values["files"]:
                entry = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
                values["files"][name] |= entry
            manifest.write_text(json.dumps(values))
    ended = trials.run(*engine.command("pretrain", run.parent))
    assert not marker.exists()
    assert ended.status in (3, 4) and "Traceback" not in ended.err, ended


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("key", ["corpus.source", "sft.data", "sft.init_from", "tokenizer.path", "tokens.path"])
def test_a_pickle_as_the_value_of_a_key(engine, trials, tmp_path, key, payload):
    marker, path = tmp_path / "marker", tmp_path / "payload.pkl"
    path.write_bytes(PAYLOADS[payload](marker))
    run = engine.fresh_run("sft", "key-pickle")
    command = {"corpus": "clean", "tokenizer": "tokenizer", "tokens": "tokenize", "sft": "sft"}[key.split(".")[0]]
    answer(trials, command, engine.folder / "recipe.yaml", "--runs-dir", run.parent, f"--{key}", path)
    assert not marker.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.pkl"])
def test_a_pickle_as_a_recipe(trials, tmp_path, name, payload):
    marker, path = tmp_path / "marker", tmp_path / name
    path.write_bytes(PAYLOADS[payload](marker))
    answer(trials, "run", path, "--runs-dir", tmp_path / "runs")
    assert not marker.exists() and not (tmp_path / "runs").exists()


YAMLS = [
    "name: !!python/object/apply:os.system ['touch {marker}']",
    "name: !!python/object/new:os.system ['touch {marker}']",
    "name: !!python/object:pathlib.Path {}",
    "name: !!python/name:os.system",
    "name: !!python/module:os",
    "name: !!python/object/apply:subprocess.check_output [['touch', '{marker}']]",
    'seed: !!python/object/apply:eval [\'open("{marker}", "w")\']',
    "!!python/object/apply:os.system ['touch {marker}']",
    "? !!python/object/apply:os.system ['touch {marker}']\n: 1",
    "name: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch {marker}']",
    "%TAG !p! tag:yaml.org,2002:python/\n---\nname: !p!object/apply:os.system ['touch {marker}']",
    "name: !anything x",
    "name: !!binary aGVsbG8=",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\nname: *d",
    "a: &a\n  <<: *a",
    "name: &n [*n]",
    "name: " + "[" * 5000,
    "name: " + "{a: " * 5000,
    "name: x\nname: y",
    "a: 1\n---\nb: 2",
    "name: \x00",
    "name: \ud800",
    "- a list",
    "a text",
    "corpus: {source: x, source_: y}",
    "name: 2026-99-99",
    "seed: 1e999999999",
    "seed: " + "9" * 5000,
    "seed: .nan",
    "name: x" + " " * (10 << 20),
    "#" * (10 << 20),
    "a: [" + "x," * (5 << 20) + "]",
]


@pytest.mark.parametrize("number", range(len(YAMLS)))
def test_hostile_yaml(trials, tmp_path, number):
    marker, path = tmp_path / "marker", tmp_path / "recipe.yaml"
    path.write_bytes(YAMLS[number].replace("{marker}", str(marker)).encode("utf-8", "surrogatepass"))
    ended = trials.run("run", path, "--runs-dir", tmp_path / "runs", limit_seconds=20)
    assert not marker.exists() and not (tmp_path / "runs").exists()
    lines = ended.err.splitlines()
    assert ended.status == 2 and len(lines) == 1 and lines[0].startswith("ERROR E-C"), ended
    assert ended.seconds < 10


NAMES = [
    *(
        "../out",
        "..",
        ".",
        "/tmp/out",
        "a/b",
        "a\\b",
        "~",
        "~/out",
        "$HOME",
        "${HOME}",
        "$(touch x)",
        "`touch x`",
        "a b",
    ),
    *("a;touch x", "a|b", "a&b", "a\nb", "a\x00b", ".hidden", "-rf", "x" * 65, "", "é", "%2e%2e", "*", "?", "con:"),
]


@pytest.mark.parametrize("name", [name for name in NAMES if "\x00" not in name])
def test_a_run_s_name_is_no_path(trials, tmp_path, write_recipe, name):
    folder = tmp_path / "deep" / "runs"
    folder.mkdir(parents=True)
    path = write_recipe({"name": name, "corpus": {"source": "x.txt"}})
    before = sorted(tmp_path.rglob("*"))
    ended = trials.run("run", path, "--runs-dir", folder)
    if name == "-rf":  # an ordinary name, and never an option: no shell sees it
        assert ended.status == 3 and {entry.name for entry in folder.iterdir()} <= {"-rf"}
        return
    assert ended.status == 2 and "E-CONFIG-VALUE" in ended.err, ended
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stage", ["../../outside", "/tmp/outside-of-groundup", "..", "a/../../../outside"])
def test_a_manifest_cannot_name_files_outside(engine, tmp_path, stage):
    """An artifact's record that points out of its folder writes nothing and is not believed."""
    folder = Path(shutil.copytree(engine.unbroken / "tokens", tmp_path / "tokens"))
    values = json.loads((folder / "MANIFEST.json").read_bytes())
    values["files"] = {stage: {"bytes": 1, "sha256": "0" * 64}}
    (folder / "MANIFEST.json").write_text(json.dumps(values))
    with pytest.raises(GroundupError):
        verify(folder, read_manifest(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens"]


def test_a_link_in_a_run_s_place_is_not_written_through(engine, trials, tmp_path, write_recipe):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_text("mine")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "case").symlink_to(tmp_path / "mine")
    sections = trial_sections(engine.folder.parent)
    recipe = write_recipe({"corpus": sections["corpus"]})
    assert "E-OUT-FOREIGN" in answer(trials, "clean", recipe, "--runs-dir", tmp_path / "runs")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file.txt"]


def test_secrets_of_the_environment_stand_nowhere(engine, trials, write_recipe, tmp_path):
    """G03: a token in the environment is in no file of the run and in no output."""
    secret = "canary-7f3a91c2"
    sections = trial_sections(engine.folder.parent)
    recipe = write_recipe({name: sections[name] for name in ("corpus", "tokenizer", "tokens")})
    environment = {"HF_TOKEN": secret, "WANDB_API_KEY": secret, "https_proxy": f"http://user:{secret}@proxy"}
    for stage in ("clean", "tokenizer", "tokenize"):
        ended = trials.run(stage, recipe, "--runs-dir", tmp_path / "runs", environment=environment)
        assert ended.status == 0 and secret not in ended.out + ended.err
    run = engine.fresh_run("pretrain", "secret")
    ended = trials.run(*engine.command("pretrain", run.parent), environment=environment)
    assert ended.status == 0 and secret not in ended.out + ended.err
    files = [path for root in (run, tmp_path / "runs") for path in root.rglob("*") if path.is_file()]
    assert len(files) > 30 and not any(secret.encode() in path.read_bytes() for path in files)


def test_there_are_as_many_payloads_as_promised():
    """150 in all: pickles, YAML, names and templates."""
    pickles = 3 * (7 + 10 + 1 + 3 + 3 + 5 + 2) + 2 * 4
    assert pickles + len(YAMLS) + len(NAMES) - 1 + 5 >= 150
    assert yaml.safe_load(YAMLS[-4].replace("9" * 5000, "1")) is not None
