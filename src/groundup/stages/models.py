"""A MODEL on the command line: a model directory, or a run, which stands for its last stage's model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from groundup.base.amounts import counted
from groundup.base.artifact import MANIFEST, read_manifest
from groundup.base.errors import ConfigError
from groundup.base.failpoints import reach
from groundup.base.files import sha256_of, sync_file, sync_folder
from groundup.base.pickles import refuse_pickle
from groundup.checkpoint.huggingface import load_model, model_dtype, read_eos_ids, read_model_config, save_model
from groundup.checkpoint.weight_slices import FolderWeights
from groundup.model.causal_lm import CausalLM
from groundup.tokenizer.bpe import TextTokenizer

LAST_FIRST = ("lora/model", "sft/model", "pretrain/model", "model")


def find_model(model: str) -> Path:
    """The directory of a MODEL. Raises ConfigError if there is none, CheckpointError for a pickle."""
    path = Path(model)
    refuse_pickle(path)
    for folder in (path, *(path / name for name in LAST_FIRST), *(Path("runs") / model / name for name in LAST_FIRST)):
        if (folder / "config.json").is_file():
            return folder
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            "E-MODEL-NONE",
            what="an adapter alone is no model",
            where=path,
            next=f"merge it: `groundup merge {path} --base MODEL --to FOLDER`",
        )
    raise ConfigError(
        "E-MODEL-NONE", what=f"no model at {model!r}", next="give a model directory, a run's folder or its name"
    )


def load_with_tokenizer(folder: Path) -> tuple[CausalLM, TextTokenizer]:
    """A model and the tokenizer beside it. Raises ConfigError if they do not belong together."""
    tokenizer = tokenizer_beside(folder)
    return load_model(folder), tokenizer


def tokenizer_beside(folder: Path) -> TextTokenizer:
    """The tokenizer in a model's directory. Raises ConfigError if it has ids for which the model has no row, or is not the
    one that the model was written with."""
    tokenizer_hash(folder)
    tokenizer, rows = TextTokenizer(folder), read_model_config(folder).vocab_size
    assert rows != "auto", "a directory says how many rows there are"
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            "E-TOKENIZER-MISMATCH",
            what=f"the tokenizer has {tokenizer.vocab_size} ids, the model {rows} rows",
            where=folder,
            next="give the tokenizer the model was trained with",
        )
    return tokenizer


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the tokenizer in a model's directory. Raises ConfigError where the stage that made the model noted another."""
    path = folder / "tokenizer.json"
    found = sha256_of(path) if path.is_file() else ""
    for stage, name in ((folder, path.name), (folder.parent, f"{folder.name}/{path.name}")):
        manifest = read_manifest(stage)
        if manifest is not None and name in manifest.files:
            refuse_other_tokenizer(found, str(manifest.files[name]["sha256"]), folder)
    return found


def refuse_other_tokenizer(found: str, noted: str | None, where: Path) -> None:
    """Raise ConfigError for the hash of a tokenizer that is not the noted one; where none was noted, any will do."""
    if noted is not None and found != noted:
        raise ConfigError(
            "E-TOKENIZER-MISMATCH",
            what=f"tokenizer.json is not the one it was trained with (SHA-256 {found[:12] or 'of none'}… for {noted[:12]}…)",
            where=where,
            next="give the tokenizer the model was trained with",
        )


def padding_words(padding: int) -> str:
    """What to say of so many rows of the embedding beyond the tokenizer's ids."""
    return f"{counted(padding, 'row')} of the embedding {'is' if padding == 1 else 'are'} padding: no token has them"


def tokenizer_of_adapter(adapter: Path) -> str | None:
    """SHA-256 of the tokenizer of an adapter's base, as the stage that trained it noted it; None where none did."""
    manifest = read_manifest(adapter.parent)
    return manifest.inputs.get("tokenizer") if manifest is not None else None


def base_to_train(folder: Path, *, is_whole: bool) -> tuple[CausalLM, FolderWeights | None]:
    """A model to go on training: whole, or without memory, and beside it what gives each rank its part of the values.

    Raises CheckpointError for weights that are not the model's.
    """
    if is_whole:
        return load_model(folder), None
    model = CausalLM.without_memory(read_model_config(folder))
    return model, FolderWeights(folder, model)


def export_model(model: str, target: Path, dtype: str) -> Path:
    """Write a MODEL as a Hugging Face directory in another dtype. Raises ConfigError if the target is in use."""
    source, wanted = find_model(model), model_dtype(dtype)
    refuse_used(target)
    loaded, tokenizer = load_with_tokenizer(source)
    eos_ids = read_eos_ids(source, tokenizer)
    first = tokenizer.end_of_turn_id if "im_end" in str(tokenizer.config.get("eos_token")) else tokenizer.end_of_text_id
    ordered = [first, *(token for token in eos_ids if token != first)]
    with placed_whole(target) as folder:
        save_model(folder, loaded.config, loaded.named_parameters(), tokenizer, eos_token_ids=ordered, dtype=wanted)
    return target


def place_model(source: Path, target: Path, *, adapter: Path | None = None) -> None:
    """Copy a finished model to another place, its adapter into `adapter/`; what stood there is replaced."""
    with placed_whole(target) as folder:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        if adapter is not None:
            shutil.copytree(adapter, folder / "adapter")


def refuse_used(target: Path) -> None:
    """Raise ConfigError for a folder with something in it, or a file."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError("E-OUT-EXISTS", what="the target folder is not empty", where=target, next="name a new folder")


@contextmanager
def placed_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when all in it is on the disk."""
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    new.mkdir(parents=True)
    try:
        yield new
        for path in sorted(new.rglob("*")):
            sync_file(path)
        reach("model.before_place")
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)
