"""Models by their name on the Hugging Face Hub: from its cache, else downloaded, after saying what."""

import re
from pathlib import Path

from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.log import Log
from groundup.checkpoint.weight_files import weight_files

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r".*-\d+-of-0*(\d+)\.safetensors")
WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json")
NEEDED = ("config.json", "tokenizer.json")
TEMPLATES = ("special_tokens_map.json", "*.jinja")


def is_hub_name(text: str) -> bool:
    """Whether a text that is no path here can be an owner and a model."""
    return _NAME.fullmatch(text) is not None and not Path(text).exists()


def is_whole(folder: Path) -> bool:
    """Whether a download into the Hub's cache came to its end: config, tokenizer and every shard of the weights.

    Each file appears there when it is complete, but one after the other.
    """
    if not all((folder / name).is_file() for name in NEEDED):
        return False
    try:
        files = weight_files(folder)
    except CheckpointError:  # a shard of the index is missing, or every one
        return False
    numbered = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    return all(file.is_file() for file in files) and all(int(match[1]) == len(numbered) for match in numbered)


def model_of_hub(name: str, log: Log) -> Path:
    """The directory of a Hub model. Raises ConfigError where it is neither in the cache nor to be had, CheckpointError
    for one without safetensors."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # the library that carries the requests has had three names; a connection that fails is its HTTPError
    faults: tuple[type[Exception], ...] = (
        *(OSError, OfflineModeIsEnabled, HFValidationError),
        *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"),
    )
    patterns = [*WANTED, *TEMPLATES]
    try:
        cached = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if is_whole(cached):
            return cached
        log.say(f"{name}: the cache holds a part of it only, {cached}")
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # it is not there yet
    try:
        files = HfApi().model_info(name, files_metadata=True).siblings or []
        chosen = [file for file in files if any(Path(file.rfilename).match(pattern) for pattern in patterns)]
        if not any(file.rfilename.endswith(".safetensors") for file in chosen):
            raise CheckpointError(
                "E-CKPT-FORMAT",
                what="the model has no safetensors; pickles are not read",
                where=name,
                next="choose another model, or convert it offline",
            )
        size = sum(file.size or 0 for file in chosen)
        log.say(f"downloads {len(chosen)} files, {size / 1e6:,.1f} MB, of https://huggingface.co/{name}")
        return Path(snapshot_download(name, allow_patterns=patterns))
    except faults as error:
        raise ConfigError(
            "E-HUB",
            what=f"neither a directory here nor to be had from the Hub: {' '.join(str(error).split())[:160]}",
            where=name,
            next="give a model directory, or make a connection and try again",
        ) from None
