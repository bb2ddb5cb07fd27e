"""Files: an atomic writer, a JSON reader, and checks before compute that files can be written."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes | Callable[[Path], object]) -> Path:
    """Write `path` beside its place, flush it to disk, rename it: complete, or as it was before.

    `content` is bytes, or a function that writes a file or folder to the path it is given. A former
    folder is kept as `<name>.old`. Raises OSError with the path.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    old = path.with_name(f"{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        partial.write_bytes(content) if isinstance(content, bytes) else content(partial)
        for part in (partial, *partial.rglob("*")):
            flush(part)
        if path.is_dir():  # a folder cannot be replaced in one call
            shutil.rmtree(path) if old.exists() else path.rename(old)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:  # whose own text often lacks the path
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            remove(partial)
    return path


def write_json(path: Path, content: object) -> Path:
    """Write `content` as indented JSON, atomically."""
    return write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each *.json and *.safetensors file of a folder, by name."""
    found = {}
    for path in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def expect_writable(folder: Path, need: int = 2**20) -> None:
    """Raise OSError if no file can be written in `folder`, or if fewer than `need` bytes are free.

    The folder is not made: a temporary file is opened in it, or in its nearest existing parent.
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
        free_mib, need_mib = free // 2**20, -(-need // 2**20)
        raise OSError(errno.ENOSPC, f"{free_mib} MiB free, expected {need_mib} for what will be written", str(there))


def expect_file(name: str) -> Path | None:
    """The path of a new file to be written, "" for none. Raises OSError if it exists or cannot be written."""
    if not name:
        return None
    path = Path(name)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if os.path.lexists(path):
        raise FileExistsError(f"output: got {name}, which exists, expected a new file; name another, or remove it")
    expect_writable(path.parent)
    return path


def not_downloaded(start: bytes) -> str | None:
    """What stands in a file's place if its first bytes are of a Git LFS pointer or an HTML page."""
    start = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "an HTML page" if start.startswith((b"<!doctype html", b"<html")) else None


def parse_json(text: bytes, *, constants: bool = False) -> dict:
    """The JSON object in `text`, UTF-8. Raises ValueError that says what is there instead, "got ...".

    Stricter than `json`: no key twice, no NaN or Infinity unless `constants` (transformers 4 writes them).
    """
    start = text.lstrip()[:100].lower()
    looks: dict[str | None, object] = {
        "nothing": not text,
        "a blank line": not start,
        (page := not_downloaded(start)): page,
        "a byte order mark": start.startswith(b"\xef\xbb\xbf"),
        "UTF-16 text": start.startswith((b"\xff\xfe", b"\xfe\xff")),
        "gzip data": start.startswith(b"\x1f\x8b"),
        "a NUL byte": b"\0" in text,
        "a JSON array": start.startswith(b"["),
    }
    if found := next((what for what, true in looks.items() if true), None):
        raise ValueError(f"got {found}")
    try:
        allowed = float if constants else _refuse
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=allowed, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise ValueError(f"got bytes that are not UTF-8 from byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"got {text[:40]!r}, no JSON from character {error.pos}") from None
    except RecursionError:
        raise ValueError("got brackets nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"got {str(value)[:40]}, no object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict:
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"got the key {twice[:40]!r} twice")
    return dict(pairs)


def _refuse(name: str):
    raise ValueError(f"got {name}, which is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > 4000:  # Python's own limit is 4300
        raise ValueError(f"got a number of {len(digits)} digits")
    return int(digits)


def read_json(path: Path, what: str, *keys: str, constants: bool = False) -> dict:
    """The JSON object in `path`, which holds `what` and has `keys`; else ValueError, one line."""
    try:
        value = parse_json(path.read_bytes(), constants=constants)
        if missing := [key for key in keys if key not in value]:
            raise ValueError(f"got no {missing[0]}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}, expected {what}, a JSON object; restore or delete it") from None
    return value
