"""Files: one atomic writer, one JSON reader, and checks that something can be written, before any compute."""

import errno
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> Path:
    """Write `data` beside `path` and rename: a reader, a killed writer or a full disk never leaves half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:  # whose own text often lacks the path
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def expect_writable(folder: Path, need: int = 2**20) -> None:
    """OSError, before any compute, if files could not be written in `folder` or `need` bytes are not free there.

    The folder is not made: a file is opened and dropped in it, or in the nearest folder above that exists.
    """
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(there)) from error
    if free < need:
        raise OSError(errno.ENOSPC, f"{free / 2**20:.0f} MiB free, expected {need / 2**20:.0f}", str(there))


def expect_file(name: str) -> Path | None:
    """The path of a file to be written, "" for none. OSError, before any compute, if that could not be done."""
    if not name:
        return None
    path = Path(name)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    expect_writable(path.parent)
    return path


def read_json(path: Path, what: str, *keys: str) -> dict:
    """The JSON object in `path`, with `keys` in it; else a ValueError of one line. `what` says what it should be."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # not JSON, not UTF-8, a million brackets
        value = None
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise ValueError(f"{path}: expected {what}, a JSON object; it is damaged: delete or restore it")
    return value
