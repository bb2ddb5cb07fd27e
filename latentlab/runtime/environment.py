"""The machine and this process: repository, versions, peak memory, signal handlers, the Hub."""

import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

TIMEOUT = 5.0  # seconds until a Hub that does not answer counts as unreachable


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

    written = [f":(exclude){path}" for path in ("reports", "README.md", "docs", "notebooks/*.ipynb")]  # results, texts
    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".", *written) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hub_answers() -> bool:
    """True if the Hub answers within TIMEOUT (its libraries retry for long), or HF_HUB_OFFLINE is set."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        if not constants.HF_HUB_OFFLINE:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
        return True
    except Exception:  # no DNS, no route, refused, proxy, timeout: the type depends on the HTTP library
        return False


@contextmanager
def on_signals(handler: Callable, names: Sequence[str] = ("SIGINT", "SIGTERM")) -> Iterator[None]:
    """Call `handler(number, frame)` on these signals; the former handlers come back at the end.

    Signals that the system lacks are left out; outside the main thread, where Python allows no
    handlers, nothing is changed.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in former.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
