"""reliability.py with numbers for every day: what `make reliability` counts in reports/reliability.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS, NANS, SOAK = 21, 1, 300
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One process of one thread, so that it can fork; its counts."""
    path = tmp_path_factory.mktemp("reliability") / "reliability.json"
    path.write_text(json.dumps({"metrics": {"processes": {"of": "another command"}}}))
    words = ["--kills", KILLS, "--nans", NANS, "--soak", SOAK, "--json", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.reliability.kills", *map(str, words)], check=True, env=environment, cwd=ROOT
    )
    return json.loads(path.read_text())["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["curriculum", "grpo"])
def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_been(measured, loop):
    found = measured["kills"][loop]
    assert found["differences"] == [] and found["identical"] == found["resumed"] >= KILLS
    assert found["unreadable_checkpoints"] == 0 and found["kills"] > KILLS
    assert min(found["by_moment"].values()) >= 3  # calls, file calls, half writes, half lines, the clock
    left = found["left_behind"]  # best.partial alone is rare: one kill in nine
    for trace in ("no state.pt yet", "state.pt.partial", "lines to drop", "cut line"):
        assert left[trace] > 0, f"no kill left {trace}: the kills do not hit what they should"


@pytest.mark.slow
def test_a_nan_anywhere_stops_the_run_and_spoils_no_checkpoint(measured):
    cases = [(loop, kind, row) for loop in ("curriculum", "grpo") for kind, row in measured["nan"][loop].items()]
    assert len(cases) == 7
    for loop, kind, row in cases:
        where = row["named_the_step"] + (row["named_a_later_step"] if kind == "weights" else 0)
        assert row["stopped"] == where == row["checkpoint_good"] == row["identical"] == row["cases"] == NANS, (
            loop,
            kind,
        )


@pytest.mark.slow
def test_memory_and_open_files_stay_as_they_are(measured):
    found = measured["soak"]
    assert found["open_files"]["min"] == found["open_files"]["max"]
    assert found["python_objects_growth"]["mean"] < found["measured_steps"]  # less than one object a step
    assert found["heap_growth_bytes"]["mean"] < 256 * found["measured_steps"]
    assert found["resident_growth_mib"]["mean"] < 1


@pytest.mark.slow
def test_sections_of_other_commands_stay(measured):
    assert measured["processes"] == {"of": "another command"}
