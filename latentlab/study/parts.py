"""A checkpoint folder as files of at most 64 MiB, for machines that take no larger ones; rejoined and checked.

python -m latentlab.study.parts FOLDER PARTS        split FOLDER into PARTS/*.part…, with parts.json
join(PARTS, TARGET)                           put it together again, every file verified by sha256
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

LIMIT = 60 * 2**20  # bytes of a part
LIST = "parts.json"


def is_split(folder: str | Path) -> bool:
    """Whether `folder` holds a split checkpoint."""
    return (Path(folder) / LIST).is_file()


def split(folder: str | Path, target: str | Path, limit: int = LIMIT) -> Path:
    """Write the files of `folder` into `target` in parts of at most `limit` bytes; the list is written last."""
    folder, target = Path(folder), Path(target)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"parts: got {folder}, which holds no file, expected a checkpoint folder")
    target.mkdir(parents=True, exist_ok=True)
    listed = {}
    for path in files:
        digest, names = hashlib.sha256(), []
        with open(path, "rb") as source:
            while (piece := source.read(limit)) or not names:
                digest.update(piece)
                names.append(f"{path.name}.part{len(names):03}")
                (target / names[-1]).write_bytes(piece)
        listed[path.name] = {"sha256": digest.hexdigest(), "parts": names}
    (target / LIST).write_text(json.dumps(listed, indent=1) + "\n")
    return target


def join(folder: str | Path, target: str | Path) -> Path:
    """Put the files of `folder` together in `target`; a `target` that is there already is checked and kept.

    Raises FileNotFoundError for a missing part and ValueError for a wrong sha256; `target` then stays as it was.
    """
    folder, target = Path(folder), Path(target)
    try:
        listed = json.loads((folder / LIST).read_text())
        plain = all(Path(n).name == n for name, entry in listed.items() for n in (name, *entry["parts"]))
        wanted = {name: str(entry["sha256"]) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise ValueError(f"parts: could not read {folder / LIST}, expected the list that `split` wrote; copy it again")
    if target.is_dir() and {path.name: _sha256(path) for path in target.iterdir()} == wanted:
        return target
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, entry in listed.items():
        with open(partial / name, "wb") as whole:
            for part in entry["parts"]:
                if not (folder / part).is_file():
                    raise FileNotFoundError(f"parts: got no {folder / part}, expected all that {LIST} names; copy it")
                whole.write((folder / part).read_bytes())
        got = _sha256(partial / name)
        if got != wanted[name]:
            raise ValueError(
                f"parts: got sha256 {got[:12]}… of {name}, expected {wanted[name][:12]}…; copy its parts again"
            )
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m latentlab.study.parts FOLDER PARTS")
    print("wrote", split(*sys.argv[1:]))
