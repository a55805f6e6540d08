"""Which files of a model directory hold its weights."""

import json
from pathlib import Path

from groundup.base.errors import CheckpointError
from groundup.base.pickles import refuse_pickle, refuse_pickles_in

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those its index names, else model.safetensors, else all but adapters.

    A directory may hold the same weights twice, in another layout. Raises CheckpointError for a shard that is missing
    and where there are no weights.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    paths = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("adapter_")]
    if not paths:
        refuse_pickles_in(folder)
        raise CheckpointError(
            "E-MODEL-NONE", what="no *.safetensors files", where=folder, next="give a model directory"
        )
    return paths


def _indexed(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        names = sorted(set(dict(json.loads(index.read_bytes())["weight_map"]).values()))
    except (ValueError, TypeError, KeyError) as error:
        refuse_pickle(index)
        raise CheckpointError(
            "E-MODEL-DAMAGED", what=f"not an index of shards: {str(error)[:120]}", where=index, next="download it again"
        ) from None
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    missing = [name for name in names if name not in outside and not (folder / name).is_file()]
    if outside or missing:
        what = f"the index names {outside[0]!r}, no file of this folder" if outside else f"{missing[0]} is missing"
        refuse_pickles_in(folder)
        raise CheckpointError("E-MODEL-DAMAGED", what=what, where=index, next="download it again")
    return [folder / name for name in names]
