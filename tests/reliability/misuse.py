"""Bad inputs, a killed pipeline and stopped sweeps, counted: `make reliability` writes them into reliability.json.

The counts are those of the tests themselves, which must all pass: each of them records what it tried and saw. The
section `misuse` has a row for each bad input: its kind, the test, the words of the command, exit code and line.
"""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from latentlab.study import results
from tests.reliability.kills import write_sections

SECTIONS = ("inputs", "pipeline", "sweeps")


class Counts:
    """A pytest plugin that adds up what passing tests record."""

    def __init__(self):
        self.sections = {name: Counter() for name in SECTIONS}
        self.rows = []

    def pytest_runtest_logreport(self, report):
        for name, counts in report.user_properties if report.when == "teardown" else ():
            if name == "misuse":
                self.rows += counts
                continue
            for key, value in counts.items():
                known = self.sections[name]
                known[key] = value if isinstance(value, str) else known[key] + value


def main(path=None) -> int:
    started, counts, here = time.time(), Counts(), Path(__file__).parents[1]
    files = [
        str(here / name)
        for name in ("reliability/test_bad_inputs.py", "study/test_pipeline.py", "study/test_launch.py")
    ]
    code = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[counts])
    if code == 0:
        sections = {name: dict(section) for name, section in counts.sections.items()}
        sections["misuse"] = {"by_kind": dict(Counter(row["kind"] for row in counts.rows)), "rows": counts.rows}
        write_sections(sections, path=path or results.reports_folder() / "reliability.json", started=started)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
