"""launch.py: which processes are started, which again, what is kept; as processes here and as jobs of a fake SLURM."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentlab.cli import parse
from latentlab.config import load_preset
from latentlab.study import launch
from latentlab.study.launch import STOPPED, Job, Launcher, Process, Stopped, run_jobs, run_processes

SMOKE = load_preset("smoke")
JOBS = [Job(name, "curriculum", replace(SMOKE, seed=seed)) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
LOCAL, ONCE = Launcher(), Launcher(retries=0)


def run(jobs, folder, launcher=LOCAL, workers=1):
    run_jobs(jobs, folder, partial(run_processes, launcher=launcher, workers=workers))


@pytest.fixture
def folder(tmp_path):
    for job in JOBS:
        (tmp_path / job.name).mkdir()
    return tmp_path


def table(folder):
    """{run: state} of table.md."""
    rows = [line.strip("| ").split(" | ") for line in (folder / "table.md").read_text().splitlines()]
    assert rows[0] == ["Run", "State", "Validation accuracy", "Seconds"]
    return {row[0]: row[1] for row in rows[2:]}


# -- which runs -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_recorded_and_not_redone(processes, folder):
    run(JOBS[:2], folder)
    assert processes.names == ["a", "b"]
    done = json.loads((folder / "a" / "done.json").read_text())
    assert done["validation_accuracy"] == 0.5 and done["commit"] == "0123" and done["seconds"] >= 0
    assert done["command"] == f"curriculum --preset smoke --seed 1 --out {folder / 'a'}"
    run(JOBS, folder)
    assert processes.names == ["a", "b", "c"]
    assert all(env["OMP_NUM_THREADS"] == "1" and "PATH" in env for env in processes.environments)
    assert table(folder) == {"a": "finished", "b": "finished", "c": "finished"}


def test_a_finished_run_of_another_command_is_refused_before_any_process(processes, folder):
    run(JOBS[:1], folder)
    with pytest.raises(
        ValueError, match="^sweep: a was made by `curriculum .*--seed 1 .*`, expected `curriculum .*--seed 9 "
    ) as error:
        run([JOBS[1], Job("a", "curriculum", replace(SMOKE, seed=9))], folder)
    assert processes.names == ["a"] and "\n" not in str(error.value)


def test_the_words_of_a_run_are_its_changes_to_the_preset(processes, folder):
    config = replace(SMOKE, seed=1, grpo=replace(SMOKE.grpo, steps=5, beta=0.1), sweep=replace(SMOKE.sweep, workers=7))
    job = Job("a", "grpo", config, "start/best")
    run([job], folder)
    words = ["grpo", "--preset", "smoke", "--seed", "1", "--grpo.steps", "5", "--grpo.beta", "0.1"]
    assert processes.words("a") == [*words, "--init-from", "start/best", "--out", str(folder / "a")]
    assert parse(processes.words("a"))[1] == replace(config, sweep=SMOKE.sweep)
    run([job], folder)
    assert processes.names == ["a"]


@pytest.mark.parametrize("content", [b"", b'{"command": "x', b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_record_is_one_line(processes, folder, content):
    (folder / "a" / "done.json").write_bytes(content)
    with pytest.raises(ValueError, match="expected the record of a finished run.*restore or delete it") as error:
        run(JOBS, folder)
    assert "\n" not in str(error.value) and not processes.names
    assert (folder / "a" / "done.json").read_bytes() == content


def test_a_failed_run_is_tried_again_then_listed_with_its_log(processes, folder, capsys):
    processes.codes = {"a": iter([1, 1]), "c": iter([-9])}
    (folder / "c" / "config.json").write_text("{}")  # c began, a did not
    with pytest.raises(RuntimeError, match="^sweep: 1 runs failed, see ") as error:
        run(JOBS, folder)
    assert str(folder / "a.log") in str(error.value) and "\n" not in str(error.value)
    assert "b.log" not in str(error.value) and "c.log" not in str(error.value)
    assert (folder / "a.log").read_text() == "a went wrong\n" * 2
    assert processes.names == ["a", "a", "b", "c", "c"]  # a failure does not stop the others
    assert not (folder / "a" / "done.json").exists()
    assert table(folder) == {"a": "failed, exit code 1", "b": "finished", "c": "finished"}
    processes.commands = []
    run(JOBS, folder)
    assert processes.names == ["a"] and "--resume" not in processes.words("a")
    out = capsys.readouterr().out
    assert "2 of 3 runs are finished, 1 to go" in out and "b  finished  0.5" in out and "c  finished" in out


def test_how_often_a_failed_run_is_tried(processes, folder):
    processes.codes = {"a": iter([1] * 4)}
    for retries in (0, 2):
        processes.commands = []
        with pytest.raises(RuntimeError, match="1 runs failed"):
            run(JOBS[:1], folder, Launcher(retries=retries))
        assert processes.names == ["a"] * (1 + retries)


def test_a_run_that_was_told_to_stop_is_resumed_as_often_as_it_takes(processes, folder):
    (folder / "a" / "config.json").write_text("{}")
    processes.codes = {"a": iter([STOPPED] * 5)}
    run(JOBS[:1], folder, ONCE)
    assert processes.names == ["a"] * 6 and all(words[-1] == "--resume" for _, words in processes.commands)


def test_a_failed_run_is_named_even_where_another_was_told_to_stop(folder):
    jobs = JOBS[:2]
    ends = {jobs[0].name: 1, jobs[1].name: STOPPED}
    with pytest.raises(RuntimeError, match="1 runs failed, see .*/a.log") as error:
        launch.run_jobs(jobs, folder, lambda waiting, _: iter(ends.items()))
    assert not isinstance(error.value, Stopped)
    with pytest.raises(Stopped, match="told to stop"):
        launch.run_jobs(jobs, folder, lambda waiting, _: iter({job.name: STOPPED for job in waiting}.items()))


def test_a_run_that_cannot_be_started_has_failed_and_the_others_go_on(processes, folder, capsys):
    (folder / "a.log").mkdir()
    with pytest.raises(RuntimeError, match="1 runs failed"):
        run(JOBS, folder)
    assert processes.names == ["b", "c"] and table(folder)["a"] == "failed, exit code 1"
    assert "a: [Errno 21]" in capsys.readouterr().err


def test_a_run_without_a_summary_has_failed(processes, folder, monkeypatch):
    process = SimpleNamespace(returncode=0, communicate=lambda: ("no JSON\n", None))
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **__: process)
    with pytest.raises(RuntimeError, match="1 runs failed"):
        run(JOBS[:1], folder, ONCE)
    assert "expected JSON" in (folder / "a.log").read_text() and not (folder / "a" / "done.json").exists()


def test_seconds_count_the_earlier_processes_of_a_resumed_run(processes, folder):
    """Each process counts from 0: 20 s and 300 s were spent before this one."""
    lines = [{"step": step, "seconds": seconds} for step, seconds in enumerate((10.0, 20.0, 5.0, 300.0))]
    (folder / "a" / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "sec')
    run(JOBS[:1], folder)
    assert 320 <= json.loads((folder / "a" / "done.json").read_text())["seconds"] < 330


@pytest.mark.parametrize(("visible", "seen"), [(None, ["0", "1", "0"]), ("5,7", ["5", "7", "5"])])
def test_processes_side_by_side_get_one_gpu_each(processes, folder, monkeypatch, visible, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    run(JOBS, folder, workers=3)
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for env in processes.environments) == sorted(seen)


# -- real processes -------------------------------------------------------------------------------------------------

# Stands in for the interpreter: `run -m latentlab VERB ... --out FOLDER`. What it does at each start is a word of
# FOLDER/plan; journal.txt has a line for each start and each end.
RUN = """#!{python} -SE
import json, os, signal, sys, time
target = sys.argv[sys.argv.index("--out") + 1]
def note(word):
    with open(os.path.join(os.path.dirname(target), "journal.txt"), "a") as journal:
        journal.write(word + " " + os.path.basename(target) + (" --resume" * ("--resume" in sys.argv)) + "\\n")
def stop(*_):
    note("stop")
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
open(os.path.join(target, "config.json"), "w").write("{{}}")
with open(os.path.join(target, "plan")) as plan:
    words = plan.read().split()
with open(os.path.join(target, "plan"), "w") as plan:
    plan.write(" ".join(words[1:]))
note("begin")
if words[:1] == ["wait"]:
    while not os.path.exists(os.path.join(os.path.dirname(target), "go")):
        time.sleep(0.02)
time.sleep(0.1)
note("end")
print(json.dumps({{"validation_accuracy": 0.25}}))
"""


@pytest.fixture
def real(folder, monkeypatch):
    """Real processes, of a stand-in for `python -m latentlab`."""
    stub = folder / "run"
    stub.write_text(RUN.format(python=sys.executable))
    stub.chmod(0o755)
    for job in JOBS:
        (folder / job.name / "plan").write_text("")
    monkeypatch.setattr(launch, "sys", SimpleNamespace(executable=str(stub)))
    return folder


def journal(folder):
    path = folder / "journal.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_workers_processes_at_a_time(real):
    """Two begin and wait; the third begins when they have been let go."""
    for job in JOBS:
        (real / job.name / "plan").write_text("wait")
    seen = []

    def let_go():
        wait_for(lambda: len(journal(real)) == 2)
        time.sleep(0.3)
        seen.extend(journal(real))
        (real / "go").touch()

    thread = threading.Thread(target=let_go)
    thread.start()
    run(JOBS, real, workers=2)
    thread.join()
    assert sorted(seen) == ["begin a", "begin b"] and set(table(real).values()) == {"finished"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_told_to_stop_stops_its_runs_and_the_next_goes_on(real, number, record_property):
    for name in ("a", "b"):
        (real / name / "plan").write_text("wait")

    def tell():
        wait_for(lambda: len(journal(real)) == 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="told to stop.*the same command resumes"):
        run(JOBS, real, workers=2)
    thread.join()
    assert signal.getsignal(number) is before
    assert sorted(journal(real)[2:]) == ["stop a", "stop b"]  # c was never begun
    assert table(real) == {"a": "stopped", "b": "stopped", "c": "stopped"}
    run(JOBS, real, workers=2)
    assert sorted(line for line in journal(real)[4:] if line.startswith("begin")) == [
        "begin a --resume",
        "begin b --resume",
        "begin c",
    ]
    assert set(table(real).values()) == {"finished"}
    record_property("sweeps", {"stopped_and_resumed": 1})


def test_a_killed_sweep_leaves_its_run_to_itself_and_the_next_sweep_waits_for_it(real, record_property):
    """kill -9 of the driver: its process goes on. The next sweep starts none beside it, and redoes nothing."""
    (real / "a" / "plan").write_text("wait")
    code = (
        "import sys; from types import SimpleNamespace; from pathlib import Path; from latentlab.study import launch\n"
        "from dataclasses import replace; from functools import partial; from latentlab.config import load_preset\n"
        "launch.sys = SimpleNamespace(executable=sys.argv[1])\n"
        "launch._gpus = list\n"  # without torch's seconds
        "jobs = [launch.Job('a', 'curriculum', replace(load_preset('smoke'), seed=1))]\n"
        "execute = partial(launch.run_processes, launcher=launch.Launcher(), workers=1)\n"
        "launch.run_jobs(jobs, Path(sys.argv[2]), execute)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(real / "run"), str(real)])
    wait_for(lambda: journal(real) == ["begin a"])
    driver.kill()
    driver.wait()
    threading.Timer(0.5, (real / "go").touch).start()
    run(JOBS[:1], real)
    assert journal(real) == ["begin a", "end a", "begin a --resume", "end a --resume"]
    record_property("sweeps", {"killed_and_resumed": 1})


# -- SLURM ----------------------------------------------------------------------------------------------------------

# A SLURM of one machine: sbatch runs the script in the background, srun the words behind its options.
SBATCH = """#!/bin/sh
cp "$1" {root}/script.sh
SLURM_JOB_ID={id} SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_PROCID=0 setsid sh "$1" > {root}/job.log 2>&1 &
echo $! > {root}/pid
echo "Submitted batch job {id}"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do case "$1" in --unbuffered) shift;; *) shift 2;; esac; done
exec "$@"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
if [ -e {root}/lost ]; then echo "{id}|NODE_FAIL|here"; else echo "{id}|RUNNING|here"; fi
"""
SCANCEL = """#!/bin/sh
kill -TERM -$(cat {root}/pid)
"""
SCONTROL = """#!/bin/sh
echo "$@" >> {root}/requeued
"""


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    pytest.importorskip("submitit")
    root = tmp_path_factory.mktemp("slurm")
    programs = {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": SCANCEL, "scontrol": SCONTROL}
    for name, text in programs.items():
        (root / name).write_text(text.replace("{root}", str(root)).replace("{id}", root.name[5:] + "4711"))
        (root / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(launch.__file__).parents[2]))
    return root


OPTIONS = ("partition=gpu", "time=600", "gpus_per_node=1", "account=lab-7", "exclusive=True")


def test_a_run_is_a_slurm_job_of_the_same_command(slurm, folder):
    """Nothing is replaced but SLURM itself: `latentlab data` prints one JSON line, as a run does."""
    start = launch._slurm(Launcher("slurm", OPTIONS), folder)
    assert start(Process(("data", "--n", "1", "--data.steps", "1"), folder / "a")) == 0
    done = json.loads((folder / "a" / "done.json").read_text())
    assert done["source"] == "word/test" and done["command"] == "data --n 1 --data.steps 1"
    script = (slurm / "script.sh").read_text()
    for line in (
        "partition=gpu",
        "time=600",
        "gpus-per-node=1",
        "account=lab-7",
        "exclusive",
        "job-name=latentlab",
        "cpus-per-task=2",
        "signal=USR2@90",
    ):
        assert f"#SBATCH --{line}\n" in script


def test_a_sweep_told_to_stop_cancels_its_slurm_jobs(slurm, folder):
    endless = Process(("data", "--n", "10000000", "--data.steps", "9"), folder / "a")
    threading.Timer(0.5, endless.stop).start()
    assert launch._slurm(Launcher("slurm"), folder)(endless) == STOPPED
    group = int((slurm / "pid").read_text())
    wait_for(lambda: subprocess.run(["pgrep", "-g", str(group)], capture_output=True).returncode == 1)


def test_a_lost_slurm_job_is_a_failed_run(slurm, folder, monkeypatch):
    import submitit

    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)
    (slurm / "lost").touch()
    (slurm / "srun").write_text("#!/bin/sh\nexit 1\n")
    start = launch._slurm(Launcher("slurm"), folder)
    assert start(Process(("data", "--n", "1"), folder / "a")) == 1
    assert "NODE_FAIL" in (folder / "a.log").read_text()


def test_slurm_signals_the_job_before_its_time_is_up_and_it_is_queued_again(slurm, folder):
    """SIGUSR2 to all of the job's processes, as SLURM sends it: submitit's handler asks for the requeue."""
    start = launch._slurm(Launcher("slurm"), folder)
    endless = Process(("data", "--n", "10000000", "--data.steps", "9"), folder / "a")
    thread = threading.Thread(target=lambda: start(endless), daemon=True)
    thread.start()
    wait_for((folder / "a.log").exists)
    os.killpg(int((slurm / "pid").read_text()), signal.SIGUSR2)
    wait_for((slurm / "requeued").exists)
    assert (slurm / "requeued").read_text() == f"requeue {slurm.name[5:]}4711\n"
    assert not (folder / "a" / "done.json").exists()
    endless.told_to_stop = True
    thread.join()


def test_a_job_whose_time_is_up_saves_itself_and_is_queued_again(real):
    """submitit calls `checkpoint` in the job's own process, while that waits for the run."""
    pytest.importorskip("submitit")
    (real / "a" / "plan").write_text("wait")
    process = Process(("curriculum", "--out", str(real / "a")), real / "a")
    codes = []
    thread = threading.Thread(target=lambda: codes.append(process()))
    thread.start()
    wait_for(lambda: journal(real) == ["begin a"])
    again = process.checkpoint()
    thread.join()
    assert codes == [STOPPED] and journal(real) == ["begin a", "stop a"]
    (real / "go").touch()
    assert again.function() == 0 and journal(real)[2:] == ["begin a --resume", "end a --resume"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("partition",), "got 'partition', expected sbatch options such as partition=gpu"),
        (("partition=gpu\nrm x",), "expected sbatch options"),
        (("setup=ls",), "expected sbatch options"),
        (("partition=$(ls)",), "expected sbatch options"),
        (("partitoin=gpu",), "Unavailable parameter.*partitoin"),
    ],
)
def test_a_wrong_slurm_option_is_one_line_before_anything_is_submitted(slurm, folder, options, said):
    with pytest.raises(ValueError, match=said) as error:
        run(JOBS, folder, Launcher("slurm", options))
    assert "\n" not in str(error.value) and not (slurm / "script.sh").exists()


def test_slurm_options_need_slurm():
    with pytest.raises(ValueError, match="^--slurm: got partition=gpu with --executor local; add --executor slurm$"):
        Launcher(slurm=("partition=gpu",))


def test_sbatch_that_refuses_is_a_failed_run(slurm, folder, capsys):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="1 runs failed"):
        run(JOBS[:1], folder, Launcher("slurm", retries=0))
    assert "invalid partition" in capsys.readouterr().err


def test_no_slurm_and_no_submitit_are_one_line(folder, monkeypatch):
    launcher = Launcher("slurm")
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ValueError, match='Could not detect "srun".*use local'):
        run(JOBS, folder, launcher)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="got no package submitit; pip install submitit, or use local"):
        run(JOBS, folder, launcher)
