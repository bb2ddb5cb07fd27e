"""Checkpoint files of a run, and the compatibility check when it resumes."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from latentlab.pretrained.adapters import adapted
from latentlab.runtime import distributed, files
from latentlab.runtime.environment import commit, environment

REMEDIES = {
    "threads": "pass --threads {} (another number of threads sums in another order), or ",
    "products": "resume on a machine whose --precision auto is the same, or ",
    "init_from": "name the checkpoint that the run began with, or ",
    "problems": "restore the data that the run began with, or ",
}


RESTORE = "restore it, or use another --out"
FACTS = "state.json"  # in state/, beside the shards


@dataclass
class Progress:
    """How far a run is, apart from weights and optimizer."""

    step: int = 0  # the next one
    stages: dict[str, float] = field(default_factory=dict)  # curriculum: best accuracies
    best: float = -1.0  # validation accuracy of best/
    best_step: int | None = None
    rollouts: int = 0  # grpo: rollouts made so far, whether an update used them or not


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error while `path` is written into an OSError of one line that says how to resume."""
    try:
        yield
    except Exception as error:  # a full disk: OSError, RuntimeError or SafetensorError
        text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        kept = "earlier files are kept: free some disk space, then run the same command with --resume"
        raise OSError(f"run: could not write {path} ({text.splitlines()[0][:200]}); {kept}") from error


def own_best(folder: Path, named: dict[str, str] | None, written: bytes) -> Path | None:
    """Which of best/ and best.old/ has the files that state.pt names; None if it names none yet.

    Then a best/ is the run's own only if a kill hit between it and state.pt, so that `written`, the
    lines of metrics.jsonl after state.pt, have its validation; else ValueError.
    """
    best, old = folder / "best", folder / "best.old"
    if named is None:
        own = None
    elif not (own := next((path for path in (best, old) if named.items() <= files.digests(path).items()), None)):
        got = "other content" if best.exists() else "no such folder"
        raise ValueError(f"resume: {best}: got {got}, expected the weights that state.pt names; {RESTORE}")
    if own is None and best.exists() and b'"validation_accuracy"' not in written:
        raise ValueError(f"resume: {best}: got weights that are not of this run, expected none; {RESTORE}")
    return own


def settle_best(folder: Path, own: Path | None) -> None:
    """Leave `own`, one of best/ and best.old/, as best/, and remove the other."""
    best, old = folder / "best", folder / "best.old"
    if own != best:
        shutil.rmtree(best, ignore_errors=True)
    if own == old:
        old.rename(best)
    shutil.rmtree(old, ignore_errors=True)


def identity(loop: str, config: dict, model, problems: Iterable) -> dict:
    """What must be the same when a run resumes, by the names that error messages use."""
    digest = hashlib.sha256("".join(map(repr, problems)).encode()).hexdigest()[:16]
    weights = {key: value for key, value in model.provenance.items() if key != "name"}
    own = {"threads": torch.get_num_threads(), "products": str(model.autocast_dtype or model.dtype)}
    return {**config, "loop": loop, **own, "init_from": weights, "problems": digest}


def made_with() -> dict:
    """What may differ when a run resumes, with a message: the code and its libraries."""
    versions = {key: value for key, value in environment().items() if key in ("python", "torch", "transformers")}
    return {"commit": commit(), **versions, "processes": distributed.size()}


def trained_state(model) -> dict[str, torch.Tensor]:
    """The state of `model.lm` without frozen weights, which are in the file of a LoRA adapter's base."""
    frozen = _frozen(model)
    return {name: value for name, value in model.lm.state_dict().items() if name not in frozen}


def load_trained(model, state: dict[str, torch.Tensor]) -> None:
    """Load what `trained_state` returned; raises RuntimeError where a tensor is missing or does not fit."""
    held = model.lm.state_dict()
    model.lm.load_state_dict({name: held[name] for name in _frozen(model)} | state)


def _frozen(model) -> set[str]:
    if not adapted(model):
        return set()
    return {name for name, p in model.lm.named_parameters(remove_duplicate=False) if not p.requires_grad}


def read_state(path: Path, asked: dict) -> dict:
    """The state of a run whose `identity` is `asked`, with its Progress. Raises ValueError, one line."""
    try:
        state = _read_facts(path) if path.is_dir() else _read_file(path)
        state |= {"progress": Progress(**state["progress"]), "metrics_offset": int(state["metrics_offset"])}
        state |= {
            "metrics_sha256": str(state["metrics_sha256"]),
            "best_sha256": state["best_sha256"] and dict(state["best_sha256"]),
        }
        stored, before, now = dict(state["identity"]), state["made_with"], made_with()
        changed = [f"{key} {before[key]} (now {now[key]})" for key in now if before[key] != now[key]]
    except Exception as error:  # truncated, foreign, or a pickle that weights_only refuses
        raise ValueError(unusable(path, error)) from error
    expect_same(stored, asked, "the checkpoint")
    if changed and distributed.rank() == 0:
        print(f"resume: the checkpoint was made with {', '.join(changed)}; last digits may differ", file=sys.stderr)
    return state


def _read_file(path: Path) -> dict:
    if damaged := zipfile.ZipFile(path).testzip():  # torch does not verify its own checksums
        raise ValueError(f"{damaged} is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about foreign files, which are refused in one line
        return dict(torch.load(path, weights_only=True, map_location="cpu"))


def _read_facts(path: Path) -> dict:
    state = files.read_json(path / FACTS, "the state of a run")
    if state["sizes"] != _sizes(path):
        raise ValueError(f"got files of {_sizes(path)} bytes, expected {state['sizes']}")
    return state


def expect_same(stored: dict, asked: dict, source: str, where: str = "") -> None:
    """Raise ValueError that names the first field of nested dicts that differs."""
    for key in sorted(set(stored) | set(asked)):
        a, b = stored.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            expect_same(a, b, source, f"{where}{key}.")
        elif a != b:
            name = f"{where}{key}"
            if key not in stored:  # a setting that is newer than the run
                raise ValueError(
                    f"resume: got the setting {name}, which {source} lacks, expected one made by this version; resume "
                    "with the version that began it, or use another --out"
                )
            remedy = REMEDIES.get(name.split(".")[0], "").format(a) + "use another --out"
            raise ValueError(f"resume: got {name}={b!r}, expected {a!r} as in {source}; {remedy}")


def unusable(path: Path, error: Exception) -> str:
    """The message for a checkpoint that a run cannot resume from."""
    expected = "expected it as this version wrote it; restore it, or start again with another --out"
    return f"resume: could not read {path} ({type(error).__name__}), {expected}"


def expect_finite(values: dict, step: int) -> None:
    """Raise FloatingPointError, with its place, if a float or tensor in nested dicts is not finite."""
    for name, value in values.items():
        if isinstance(value, DTensor):
            value = value.to_local()
        if isinstance(value, dict):
            expect_finite({f"{name}.{key}": inner for key, inner in value.items()}, step)
        elif isinstance(value, torch.Tensor):
            value = 0.0 if torch.isfinite(value).all() else math.nan
        if isinstance(value, float) and not math.isfinite(value):
            remedy = "lower the learning rate, with another --out" if step >= 0 else "use other weights to start from"
            raise FloatingPointError(
                f"{name}: got {value} at step {step}, expected a finite number; nothing of this step is saved; {remedy}"
            )


# -- the state of a sharded model -----------------------------------------------------------------


def state_path(folder: Path, shard: bool) -> Path:
    """Where the state of a run is, or will be: state.pt, or state/ with shards (after a kill, state.old/)."""
    path, old = folder / "state", folder / "state.old"
    return folder / "state.pt" if not shard else old if old.exists() and not path.exists() else path


def expect_state(folder: Path, shard: bool) -> None:
    """Raise ValueError if the state of a run was written with shards and is asked for without, or vice versa."""
    got, asked = (state_path(folder, kind) for kind in (not shard, shard))
    if got.exists():
        remedy = f"{'drop --shard' if shard else 'pass --shard, under torchrun'}, or use another --out"
        raise ValueError(f"resume: got {got}, expected {asked}; {remedy}")


def settle_state(folder: Path) -> None:
    """Leave the state that `state_path` names as state/."""
    path, old = folder / "state", folder / "state.old"
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def shards(lm: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict, dict]:
    """The weights, and the optimizer's tensors, of a sharded model by the names that state/ uses."""
    named = dict(lm.named_parameters())
    state = optimizer.state if optimizer is not None else {}
    moments = {f"{slot}/{name}": x for name, p in named.items() for slot, x in state.get(p, {}).items()}
    return {f"weight/{name}": p.detach() for name, p in named.items()}, moments


def write_shards(path: Path, tensors: dict[str, torch.Tensor], facts: Callable[[], dict]) -> None:
    """Write state/ on all processes: their shards as safetensors, `facts` of rank 0 as state.json."""
    partial = path.with_name(f"{path.name}.shards.partial")

    def finish(target: Path) -> None:
        partial.rename(target)
        found = {**facts(), "sizes": _sizes(target)}
        (target / FACTS).write_text(json.dumps({key: x for key, x in found.items() if key != "rng"}))

    def write() -> None:
        with writing(path), _plain_errors():
            held = {**tensors, "rng": torch.get_rng_state()}
            places = {name: 1 + i // 32 for i, name in enumerate(sorted(held))}  # a file is put together in memory
            writer = dcp.HuggingFaceStorageWriter(str(partial), places, save_distributed=True)
            dcp.save(held, storage_writer=writer)

    def rename() -> None:
        with writing(path):
            files.write_atomically(path, finish)
        shutil.rmtree(path.with_name(f"{path.name}.old"), ignore_errors=True)

    distributed.on_main(lambda: files.remove(partial))
    distributed.gather(write)
    distributed.on_main(rename)


def load_shards(path: Path, lm: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Load state/ into a sharded model and its optimizer, written by any number of processes."""
    reader, named = dcp.HuggingFaceStorageReader(str(path)), dict(lm.named_parameters())
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for key in stored:
        slot, _, name = key.partition("/")
        if optimizer is not None and slot not in ("weight", "rng"):  # a count of steps, and moments like the weight
            optimizer.state[named[name]][slot] = torch.zeros_like(named[name]) if stored[key].size else torch.zeros(())
    weights, moments = shards(lm, optimizer)
    tensors = {**weights, **moments, "rng": torch.get_rng_state()}
    with _plain_errors():
        dcp.load(tensors, storage_reader=reader)
    torch.set_rng_state(tensors["rng"])


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the error itself for torch's CheckpointException, which is no Exception."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
