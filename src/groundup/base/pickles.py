"""Pickles can run code when they are read: they are known by name or first bytes, and refused unread."""

from pathlib import Path

from groundup.base.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
HEAD_BYTES = 4


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or an archive of pickles, whatever its name says."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    # protocols 2 to 5, protocol 0 of an object, and the zip that torch.save writes
    return (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or head == b"PK\x03\x04"


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError if `path` is a pickle by its name or by its content."""
    if not path.is_dir() and (path.suffix.lower() in PICKLES or is_pickle(path)):
        raise CheckpointError(
            "E-CKPT-FORMAT",
            what=f"pickle refused: {path.name} could run code and will not be read",
            where=path.parent,
            next="give the weights as safetensors; MiniMind's are turned into them by `groundup convert FILE --to DIR`",
        )


def refuse_pickles_in(folder: Path) -> None:
    """Raise CheckpointError if a folder without usable weights holds them as pickles."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_file():
            refuse_pickle(path)
