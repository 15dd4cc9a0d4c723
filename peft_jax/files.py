"""Directories that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(folder: Path, replaced: Collection[str] | None = None) -> Iterator[Path]:
    """Gives an empty directory beside `folder`, which takes its place when the block ends without an error.

    Args:
        folder: the directory to make, or to replace.
        replaced: the names of the files that are replaced, where others in `folder` are to stay; by default all are.

    Raises:
        FileExistsError: if `folder` is a file.
    """
    folder = folder.expanduser().resolve()
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: choose another directory")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(folder)
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _swap(folder, fresh, replaced)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def _swap(folder: Path, fresh: Path, replaced: Collection[str] | None) -> None:
    """Puts `fresh` in the place of `folder`; the old files are deleted only once the new ones are there."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = folder.rename(_beside(folder))
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    for other in list(old.iterdir()):
        if replaced is not None and other.name not in replaced:
            other.rename(folder / other.name)
    shutil.rmtree(old)
