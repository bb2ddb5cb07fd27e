"""Where and with what a number was made: repository, commit, versions, device, peak memory."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def repository_root() -> Path:
    """The folder of pyproject.toml and this package; the current folder where the package is installed alone."""
    parent = Path(__file__).resolve().parents[2]
    return parent if (parent / "pyproject.toml").is_file() else Path.cwd()


def environment(weights: dict | None = None, *, device: str = "auto") -> dict:
    """Versions, device and threads of this process; `weights` = {"source": ..., "sha256": ...} of loaded weights.

    device: what was computed on, "cpu" or "cuda"; "auto" takes a GPU where there is one.
    """
    import torch  # only here: reading and plotting results needs no torch

    device = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else "cpu"
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = None
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers}
    found |= {"device": device, "threads": torch.get_num_threads(), "peak_memory_gib": peak_memory_gib()}
    return found | ({"weights": weights} if weights else {})


def peak_memory_gib() -> float:
    """The most memory that this process has held so far, in GiB; 0 where the system does not tell."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


def commit() -> str:
    """Commit of the repository, `-dirty` when more than results, README and notebooks differs; else "unknown"."""
    root = repository_root()
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments):
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # A refresh writes reports/, README.md and the notebooks' outputs itself: they say nothing of the library.
        written = [f":(exclude){path}" for path in ("reports", "README.md", "notebooks/*.ipynb")]
        changed = git("status", "--porcelain", "--", ".", *written)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
