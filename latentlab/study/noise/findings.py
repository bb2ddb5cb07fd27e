"""What the rows of the study say."""

from pathlib import Path

from latentlab.study.noise.plan import Plan


def write_findings(plan: Plan, folder: Path) -> list[Path]:
    """Write the result files of the rows that there are."""
    return []
