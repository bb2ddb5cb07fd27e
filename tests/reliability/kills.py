"""What happens to real runs, done to small ones: `make reliability` writes reports/reliability.json.

    kills    SIGKILL at random moments of both loops, then --resume: is everything bit-identical to a run left alone?
    nan      a NaN in the loss, a reward, a gradient or a weight at a random step: does the run stop and lose nothing?
    soak     thousands of tiny GRPO steps: do memory and open files stay what they were?

Every run is a forked child of this process, which has imported torch and runs one thread: a kill costs half a second.
test_reliability_result.py calls this file with smaller numbers; `write_sections` merges in the sections of other files.
"""

import argparse
import ctypes
import gc
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy import stats

from latentlab.data.word_problems import word_problems
from latentlab.pretrained.loading import model_from_config
from latentlab.runtime import environment, files
from latentlab.study import results
from latentlab.training import arms, curriculum, run
from latentlab.training.arms import fit_grpo
from latentlab.training.checkpoint import expect_finite
from latentlab.training.curriculum import fit_curriculum
from tests.conftest import small_config

LOOPS = ("curriculum", "grpo")
CONFIG = small_config(grpo={"steps": 6, "eval_every": 3, "num_iterations": 2, "learning_rate": 1e-3, "warmup_steps": 3})
PROBLEMS = [word_problems(split, n, seed=0, steps=2) for split, n in (("train", 24), ("validation", 6))]
FILES = ["best", "config.json", "metrics.jsonl", "state.pt", "timing.jsonl"]


def distinct_words(text, problem):
    """A reward that random models earn too."""
    return float(len(set(text.split())))


def fit(name, folder, minutes=10.0, reward=distinct_words, config=CONFIG):
    """One run, new or resumed; its summary lies beside its folder."""
    model, options = model_from_config(config), {"out": folder, "resume": True, "checkpoint_minutes": minutes}
    if name == "grpo":
        summary = fit_grpo(model, *PROBLEMS, config, reward=reward, **options)
    else:
        summary = fit_curriculum(model, *PROBLEMS, config, **options)
    folder.with_suffix(".json").write_text(json.dumps(summary))


def start(job):
    """The process id of a forked child that runs `job` and nothing else."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        job()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid):
    """The exit code of a child; -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(job):
    code = wait(start(job))
    assert code == 0, f"a run that should have finished ended with exit code {code}"


# ---------------------------------------------------------------- moments: each counts, and kills at the n-th
class Moment:
    """A kind of event in a run. `install` counts its events and kills the process at event number `at`."""

    def __init__(self, at=0, share=0.5):
        self.at, self.share, self.count = at, share, 0

    def now(self):
        self.count += 1
        return self.count == self.at

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Call(Moment):
    """Any call of a function of latentlab: rollouts, losses, updates, evaluations, everything between them."""

    def install(self):
        package = str(Path(run.__file__).parents[1])
        sys.setprofile(lambda frame, event, _: self.called(frame) if event == "call" else None)
        self.called = lambda frame: frame.f_code.co_filename.startswith(package) and self.now() and self.die()


class FileCall(Moment):
    """Just before, or just after, a call that renames, flushes, cuts, makes or removes a file or folder."""

    def install(self):
        for name in ("replace", "rename", "fsync", "truncate", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, original):
        def call(*args, **kwargs):
            here = self.now()
            if here and self.share < 0.5:
                self.die()
            result = original(*args, **kwargs)
            if here:
                self.die()
            return result

        return call


class Write(Moment):
    """Within the write of state.pt or of the weights in best/: a share of the bytes is there."""

    def install(self):
        save, save_model = torch.save, run.save_model

        def cut_state(state, path):
            if self.now():
                whole = io.BytesIO()
                save(state, whole)
                path.write_bytes(whole.getvalue()[: int(self.share * whole.tell())])
                self.die()
            save(state, path)

        def cut_weights(model, folder, *weights):
            save_model(model, folder, *weights)
            if self.now():
                file = Path(folder) / "model.safetensors"
                os.truncate(file, int(self.share * file.stat().st_size))
                self.die()

        torch.save, run.save_model = cut_state, cut_weights


class Line(Moment):
    """Within a line of metrics.jsonl or timing.jsonl."""

    def install(self):
        moment = self

        class Cut(io.FileIO):
            def write(self, line):
                if moment.now():
                    super().write(line[: int(moment.share * len(line))])
                    moment.die()
                return super().write(line)

        run.open = Cut


class Clock(Moment):
    """From outside, after a random share of the run's time: wherever it is, C code included."""


MOMENTS = {"call": Call, "file_call": FileCall, "write": Write, "line": Line, "clock": Clock}
LEFT = ("no state.pt yet", "state.pt.partial", "best.partial", "best.old", "lines to drop", "cut line")
SHARES = {"call": 8, "file_call": 6, "write": 6, "line": 4, "clock": 4}  # of 28 kills


# ---------------------------------------------------------------- kills
def run_kills(kills, rng, scratch):
    """`kills` of each loop: how many runs, resumed, are identical to the one left alone; what the kills left behind."""
    result = {}
    for name in LOOPS:
        wholes = {minutes: whole_run(name, scratch / f"{name}-{minutes:g}", minutes) for minutes in (0.0, 10.0)}
        assert not differences(*(whole[0] for whole in wholes.values())), "when checkpoints are written changes a run"
        rows = []
        moments = [moment for moment, share in SHARES.items() for _ in range(-(-kills * share // 28))]
        for number, moment in enumerate(moments):
            rows.append(one_kill(name, moment, wholes, (0.0, 10.0)[number % 2], rng, scratch / f"{name}-kill-{number}"))
        result[name] = {
            "kills": sum(row["kills"] for row in rows),
            "resumed": len(rows),
            "identical": sum(not row["differences"] for row in rows),
            "unreadable_checkpoints": sum(row["unreadable"] for row in rows),
            "differences": sorted({difference for row in rows for difference in row["differences"]}),
            "by_moment": {moment: sum(row["moment"] == moment for row in rows) for moment in MOMENTS},
            "left_behind": {key: sum(row["left"].count(key) for row in rows) for key in LEFT},
        }
    return result


def whole_run(name, folder, minutes):
    """(folder, seconds, events of each moment) of a run left alone."""

    def job():
        moments = {key: MOMENTS[key]() for key in ("file_call", "write", "line", "call")}
        for moment in moments.values():
            moment.install()
        begun = time.monotonic()
        fit(name, folder, minutes)
        sys.setprofile(None)
        counts = {key: moment.count for key, moment in moments.items()} | {"clock": time.monotonic() - begun}
        folder.with_suffix(".counts").write_text(json.dumps(counts))

    finish(job)
    return folder, json.loads(folder.with_suffix(".counts").read_text())


def one_kill(name, moment, wholes, minutes, rng, folder):
    """Kill a run, every third one a second time, and resume it."""
    whole, counts = wholes[minutes]
    killed, left, unreadable = 0, [], 0
    while killed < 1 + (rng.random() < 1 / 3):
        share = rng.random()
        at = share * counts["clock"] if moment == "clock" else rng.randint(1, counts[moment])
        if not kill(name, folder, minutes, moment, at, rng.random()):
            if killed:  # less was left to do than the second kill waited for
                break
            shutil.rmtree(folder)
            continue
        killed += 1
        left += left_behind(folder)
        unreadable += not readable(folder)
    finish(lambda: fit(name, folder, minutes))
    found = differences(whole, folder)
    shutil.rmtree(folder)
    return {"moment": moment, "kills": killed, "left": left, "unreadable": unreadable, "differences": found}


def kill(name, folder, minutes, moment, at, share):
    """Run until the kill: was there one?"""
    if moment == "clock":
        pid = start(lambda: fit(name, folder, minutes))
        time.sleep(at)
        os.kill(pid, signal.SIGKILL)
    else:

        def job():
            MOMENTS[moment](at, share).install()
            fit(name, folder, minutes)

        pid = start(job)
    code = wait(pid)
    assert code in (0, -signal.SIGKILL), f"exit code {code}"
    return code != 0


def left_behind(folder):
    """Which of LEFT a kill left: evidence of where it hit."""
    left = [name for name in LEFT[1:4] if any(folder.glob(name.replace(".partial", ".*.partial")))]
    metrics, timing = (folder / name for name in ("metrics.jsonl", "timing.jsonl"))
    if not (folder / "state.pt").exists():
        left.append("no state.pt yet")
    elif metrics.stat().st_size > torch.load(folder / "state.pt", weights_only=True)["metrics_offset"]:
        left.append("lines to drop")
    if any(path.exists() and path.read_bytes()[-1:] not in (b"", b"\n") for path in (metrics, timing)):
        left.append("cut line")
    return left


def readable(folder):
    """Can state.pt, and the best/ that it knows, be loaded? True where there is no state.pt yet."""
    if not (folder / "state.pt").exists():
        return True
    try:
        state = torch.load(folder / "state.pt", weights_only=True)
        if state["progress"]["best_step"] is not None:
            load_file(folder / ("best" if (folder / "best").exists() else "best.old") / "model.safetensors")
    except Exception:
        traceback.print_exc()
        return False
    return True


def differences(whole, folder):
    """What is not bit-identical in two finished runs."""
    found = [] if sorted(path.name for path in folder.iterdir()) == FILES else ["files"]
    files = ("metrics.jsonl", "config.json", "best/model.safetensors", "best/validation.json")
    found += [name for name in files if (folder / name).read_bytes() != (whole / name).read_bytes()]
    a, b = (torch.load(path / "state.pt", weights_only=True) for path in (whole, folder))
    keys = sorted((a.keys() | b.keys()) - {"made_with"})  # a commit while this runs is no fault of a run
    found += [f"state.pt {key}" for key in keys if not same(a.get(key), b.get(key))]
    if whole.with_suffix(".json").read_text() != folder.with_suffix(".json").read_text():
        found.append("summary")
    for line in (folder / "timing.jsonl").read_text().splitlines():
        json.loads(line)
    return found


def same(a, b):
    """Equality of nested dicts, lists and tensors, to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---------------------------------------------------------------- NaN
def run_nans(repeats, rng, scratch):
    """`repeats` of each case: does the run stop and say where, is the checkpoint good, does it resume?"""
    result = {}
    for name in LOOPS:
        whole, _ = whole_run(name, scratch / f"{name}-whole", 10.0)
        for kind in ("loss", "gradient", "weights", *(["reward"] if name == "grpo" else [])):
            rows = [one_nan(name, kind, whole, rng, scratch / f"{name}-{kind}-{i}") for i in range(repeats)]
            result.setdefault(name, {})[kind] = {key: sum(row[key] for row in rows) for key in rows[0]}
    return result


def one_nan(name, kind, whole, rng, folder):
    step = rng.randrange(CONFIG.grpo.steps if name == "grpo" else sum(CONFIG.curriculum.steps))
    where = rng.random()

    def job():
        reward = poison(name, kind, step, where)
        try:
            fit(name, folder, reward=reward)
        except (FloatingPointError, ValueError) as error:
            folder.with_suffix(".error").write_text(str(error))

    finish(job)
    said = folder.with_suffix(".error").read_text() if folder.with_suffix(".error").exists() else ""
    found = int(said.partition(" at step ")[2].partition(",")[0] or -1)
    good = True
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", weights_only=True)
        good = state["progress"]["step"] <= step
        expect_finite({"state.pt": {"model": state["model"], "optimizer": state["optimizer"]["state"]}}, step)
    finish(lambda: fit(name, folder))
    return {
        "cases": 1,
        "stopped": bool(said) and "\n" not in said,
        "named_the_step": found == step,
        "named_a_later_step": found > step,
        "checkpoint_good": good,
        "identical": not differences(whole, folder),
    }


def poison(name, kind, at, where):
    """Put a NaN into one number of step `at`; returns the reward to use."""
    module = arms if name == "grpo" else curriculum
    update, backward, updates = module.update, torch.Tensor.backward, [0]

    def here(this):  # is it this kind's turn?
        return kind == this and updates[0] // (CONFIG.grpo.num_iterations if name == "grpo" else 1) == at

    def spoil(tensor):
        tensor.view(-1)[int(where * tensor.numel())] = float("nan")

    def spoiled_update(model, *args, **options):
        parameter = list(model.parameters())[int(where * len(list(model.parameters())))]
        if here("gradient"):
            spoil(parameter.grad)
        stats = update(model, *args, **options)
        if here("weights"):
            spoil(parameter.data)
        updates[0] += 1
        return stats

    def spoiled_backward(loss):
        if here("loss"):
            loss.data.fill_(float("nan"))
        return backward(loss, gradient=loss.data.new_tensor(float("nan") if here("loss") else 1.0))

    module.update, torch.Tensor.backward = spoiled_update, spoiled_backward
    return lambda text, problem: float("nan") if here("reward") else distinct_words(text, problem)


# ---------------------------------------------------------------- soak
class Heap(ctypes.Structure):
    """glibc's mallinfo2: `uordblks` is the bytes of its heap that are in use."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def run_soak(steps, scratch):
    """Memory and open files over many tiny GRPO steps, a checkpoint every 0.6 s among them.

    Resident memory counts pages once touched, so it hardly ever falls; what is in use (bytes of the C heap, objects of
    Python) tells a leak from the allocator's noise.
    """
    samples, mallinfo2 = scratch / "soak.npy", getattr(ctypes.CDLL(None), "mallinfo2", Heap)
    mallinfo2.restype = Heap

    def job():
        rows, end_step = np.ones((steps + 1, 4)), run.Run.end_step  # all of it now: a list would grow itself

        def sampled(run, optimizer, record, **options):
            end_step(run, optimizer, record, **options)
            if (record["step"] + 1) % 5 == 0:
                gc.collect()  # else garbage that waits is counted
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files = len(os.listdir("/proc/self/fd"))
            rows[record["step"] + 1] = resident, mallinfo2().uordblks, sys.getallocatedblocks(), files

        gc.freeze()  # what is there already need not be searched again and again
        run.Run.end_step = sampled
        config = small_config(grpo={"steps": steps, "eval_every": 50, "learning_rate": 1e-4})
        fit("grpo", scratch / "soak", 0.01, config=config)
        np.save(samples, rows)

    finish(job)
    rows = np.load(samples)[steps // 4 :: 5]  # the first quarter fills caches
    resident, heap, objects, files = rows[: len(rows) // 20 * 20].T
    return {
        "steps": steps,
        "measured_steps": 5 * len(resident),
        "resident_mib": float(resident.mean() / 2**20),
        "resident_growth_mib": growth(resident / 2**20),
        "heap_growth_bytes": growth(heap),
        "python_objects_growth": growth(objects),
        "open_files": {"min": int(files.min()), "max": int(files.max())},
    }


def growth(values):
    """From the first to the last of 20 block means, with a 95 % interval from the spread of the 19 increments."""
    increments = np.diff(values.reshape(20, -1).mean(1))
    noise = stats.t.ppf(0.975, 18) * increments.std(ddof=1) * 19**0.5
    middle = increments.sum()
    return {"mean": float(middle), "low": float(middle - noise), "high": float(middle + noise)}


# ---------------------------------------------------------------- the file
def sizes(scratch):
    """Bytes of the checkpoints of a toy run and their share of 4 bytes a weight."""
    folder = scratch / "sizes"
    finish(lambda: fit("grpo", folder))
    weights = sum(p.numel() for p in model_from_config(CONFIG).parameters())
    best = sum(path.stat().st_size for path in (folder / "best").iterdir())
    return {"weights": weights, "state_bytes": (folder / "state.pt").stat().st_size, "best_bytes": best}


def write_sections(sections, *, path, started):
    """Put `sections` into the metrics of reliability.json; those of other commands stay, each with its own commit."""
    begun = datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")
    stamp = {"commit": environment.commit(), "started": begun}
    kept = json.loads(path.read_text())["metrics"] if path.exists() else {}
    metrics = kept | {name: section | {"commit": stamp["commit"]} for name, section in sections.items()}
    kills = {name: row for name, row in metrics.get("kills", {}).items() if name in LOOPS}
    counts = [f"{name} {row['identical']} of {row['resumed']}" for name, row in kills.items()]
    result = {
        "schema_version": 1,
        "name": "reliability",
        "preset": "",
        "question": "What does a run lose when things go wrong?",
        "headline": f"bit-identical when resumed after SIGKILL: {', '.join(counts)}",
        "parameters": {},
        "metrics": metrics,
        "arms": [],
        "environment": environment.environment(),
        **stamp,
        "seconds": round(time.time() - started, 1),
    }
    files.write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=56, help="of each loop, at least")
    parser.add_argument("--nans", type=int, default=5, help="of each kind in each loop")
    parser.add_argument("--soak", type=int, default=2000, help="GRPO steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=results.reports_folder() / "reliability.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # no thread must be left out of a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng, started, scratch = random.Random(options.seed), time.time(), Path(tempfile.mkdtemp(prefix="latentlab-"))
    try:
        sections = {"checkpoint": sizes(scratch), "kills": run_kills(options.kills, rng, scratch)}
        sections |= {"nan": run_nans(options.nans, rng, scratch), "soak": run_soak(options.soak, scratch)}
    finally:
        shutil.rmtree(scratch)
    write_sections(sections, path=options.json, started=started)
    print(options.json)


if __name__ == "__main__":
    main()
