"""The committed results: each number within its stated bounds, and every generated text equal to its source.

A reference is `tests/reference/<name>.json`:

    {"file": "tiny/01_deterministic_collapse.json", "checks": [
        {"path": "metrics.none.frac_reward_zero_std", "equals": 1.0},
        {"path": "metrics.shared.max_thought_difference", "min": 1e-6, "max": 10},
        {"path": "metrics.shared.accuracy", "approx": 0.31, "rel": 0.05},
        {"path": "arms.shared/0.difference.low", "min": 0}]}

A part of a path is a key, a number in a list, or `name/seed` (or `name`) in a list of arms. `approx` takes `rel` and
`abs`. A section that could not run is checked by its last measured form.
"""

import json
import shutil
from pathlib import Path

import pytest

from latentlab.study.tables import refresh_pages

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "reports" / "published"
REFERENCES = [json.loads(path.read_text()) for path in sorted((ROOT / "tests" / "reference").glob("*.json"))]
CHECKS = [(reference["file"], check) for reference in REFERENCES for check in reference["checks"]]


class NotMeasured(Exception):
    """The section was skipped and never measured before."""


def look_up(value, path: str):
    """The value at a dotted path; AssertionError where there is none, NotMeasured in a section that never ran."""
    for part in path.split("."):
        if isinstance(value, dict) and "skipped" in value and part != "skipped":
            if "last_measured" not in value:
                raise NotMeasured(value["skipped"])
            value = value["last_measured"]["section"]
        if isinstance(value, list) and part.isdigit():
            assert int(part) < len(value), f"{path}: no {part}"
            value = value[int(part)]
        elif isinstance(value, list):
            named = [arm for arm in value if part in (arm["name"], f"{arm['name']}/{arm.get('seed')}")]
            assert len(named) == 1, f"{path}: {len(named)} arms are {part}, expected 1"
            value = named[0]
        else:
            assert isinstance(value, dict) and part in value, f"{path}: no {part}"
            value = value[part]
    return value


def verify(value, check: dict) -> None:
    """Raise AssertionError unless `value` obeys every bound of a check; a check without bounds is an error."""
    bounds = set(check) - {"path"}
    assert bounds and bounds <= {"equals", "min", "max", "approx", "rel", "abs"}, f"{check}: unknown or no bounds"
    assert "equals" not in check or value == check["equals"], f"{check['path']}: {value}, expected {check['equals']}"
    assert "min" not in check or value >= check["min"], f"{check['path']}: {value} < {check['min']}"
    assert "max" not in check or value <= check["max"], f"{check['path']}: {value} > {check['max']}"
    if "approx" in check:
        assert value == pytest.approx(check["approx"], rel=check.get("rel"), abs=check.get("abs"))


@pytest.mark.skipif(not CHECKS, reason="no reference files yet")
@pytest.mark.parametrize(("file", "check"), CHECKS or [("", {})], ids=[f"{f}:{c['path']}" for f, c in CHECKS] or None)
def test_committed_numbers_stay_within_their_bounds(file, check):
    path = REPORTS / file
    assert path.is_file(), f"no {path}; run `make study`, then `latentlab report --publish`"
    try:
        value = look_up(json.loads(path.read_text()), check["path"])
    except NotMeasured as reason:
        pytest.skip(f"{check['path']} was never measured here: {reason}")
    verify(value, check)


@pytest.mark.skipif(not (REPORTS / "RESULTS.md").is_file(), reason="no committed results yet")
def test_generated_texts_agree_with_the_results(tmp_path):
    shutil.copytree(REPORTS, tmp_path / "reports" / "published", ignore=shutil.ignore_patterns("*.png"))
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    (tmp_path / "docs").mkdir()
    for page in pages:
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    refresh_pages(tmp_path)
    for page in (*pages, REPORTS / "RESULTS.md"):
        name = page.relative_to(ROOT)
        assert (tmp_path / name).read_bytes() == page.read_bytes(), f"{name} is stale: run `latentlab report --publish`"


def test_paths_reach_keys_lists_arms_and_last_measured_sections():
    arms = [{"name": "shared", "seed": 0, "n": 7}, {"name": "shared", "seed": 1}, {"name": "pause"}]
    skipped = {"skipped": "no Hub", "last_measured": {"started": "2026", "section": {"x": 2}}}
    result = {"a": {"b": [5, 6]}, "arms": arms, "real": skipped, "gpu": {"skipped": "no GPU"}}
    assert look_up(result, "a.b.1") == 6
    assert look_up(result, "arms.shared/0.n") == 7
    assert look_up(result, "arms.pause.name") == "pause"
    assert look_up(result, "real.x") == 2
    with pytest.raises(NotMeasured):
        look_up(result, "gpu.x")
    for path in ("a.c", "arms.shared", "a.b.9", "arms.direct"):
        with pytest.raises(AssertionError):
            look_up(result, path)


def test_bounds_are_enforced_and_misspelt_ones_refused():
    verify(1.0, {"path": "x", "equals": 1.0})
    verify(0.5, {"path": "x", "min": 0.5, "max": 0.5})
    verify(1.04, {"path": "x", "approx": 1.0, "rel": 0.05})
    for bad in ({"equals": 1.0}, {"min": 3}, {"max": 1}, {"approx": 1.0, "rel": 0.05}, {"minimum": 0}, {}):
        with pytest.raises(AssertionError):
            verify(2.0, {"path": "x", **bad})
