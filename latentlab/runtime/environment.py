"""What a number was measured with: repository, commit, versions, device and peak memory."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def repository_root() -> Path:
    """The folder of pyproject.toml; for an installed wheel the working directory."""
    parent = Path(__file__).resolve().parents[2]
    return parent if (parent / "pyproject.toml").is_file() else Path.cwd()


def environment(weights: dict | None = None, *, device: str = "auto") -> dict:
    """Versions, device, threads and peak memory (GiB) of this process.

    weights: {"source": ..., "sha256": ...} of the loaded weights. device: "cpu", "cuda", or "auto",
    which is a GPU if there is one.
    """
    import torch  # here, because reading and plotting results needs no torch

    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "peak_memory_gib": peak_memory_gib(),
    }
    return found | ({"weights": weights} if weights else {})


def peak_memory_gib() -> float:
    """Peak resident memory of this process in GiB; 0 where the system does not report it."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


def commit() -> str:
    """The repository's commit, `-dirty` if the library has changed since; or "unknown"."""
    root = repository_root()
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments):
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # A study writes these itself; they are not the library.
        written = [f":(exclude){path}" for path in ("reports", "README.md", "notebooks/*.ipynb")]
        changed = git("status", "--porcelain", "--", ".", *written)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
