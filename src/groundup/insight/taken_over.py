"""Finished stages of one run in the folder of another, without making them again: hard links, copies where there are none."""

import os
import shutil
from pathlib import Path

from groundup.base.artifact import MANIFEST, RunFolder, read_manifest


def take_over(stage: str, source: Path, run: RunFolder) -> None:
    """Put a committed stage of the run at `source` into another run; what stands there with the same files stays.

    No stage changes a committed file in its place, so both runs may hold the same one.
    """
    manifest, here = read_manifest(source / stage), read_manifest(run.path / stage)
    if manifest is None or here == manifest:
        return
    attempt = run.path / ".attempts" / f"{stage}.taken"
    for folder in (attempt, run.path / stage):
        if folder.exists():
            shutil.rmtree(folder)
    for path in sorted((source / stage).rglob("*")):
        place = attempt / path.relative_to(source / stage)
        if path.is_file() and path.name != MANIFEST:
            _link(path, place)
    _link(source / stage / MANIFEST, attempt / MANIFEST)
    attempt.rename(run.path / stage)
    if not any(attempt.parent.iterdir()):
        attempt.parent.rmdir()


def _link(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, place)
    except OSError:  # another disk, or one without links
        shutil.copy2(path, place)
