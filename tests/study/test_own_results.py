"""A user's run never touches a tracked file: a study and a notebook, in a copy of the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
IDENTITY = ("-c", "user.name=test", "-c", "user.email=test@example.org")


def git(*words, cwd):
    return subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    """This repository as it stands, committed."""
    copy = tmp_path / "repository"
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    git("init", "-q", cwd=copy)
    git("add", "-A", cwd=copy)
    git(*IDENTITY, "commit", "-qm", "copy", cwd=copy)
    return copy


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git repository")
def test_a_study_and_a_notebook_run_by_hand_leave_the_repository_as_it_was(repository):
    keep = {key: value for key, value in os.environ.items() if key != "LATENTLAB_REPORTS"}
    environment = {**keep, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

    def python(*words, cwd=repository):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python("-m", "latentlab", "study", "--preset", "smoke")
    path = repository / "notebooks" / "00_tour.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "\nnum_generations = 2"
    (repository / "out").mkdir()
    nbformat.write(notebook, repository / "out" / path.name)
    execute = ("--to", "notebook", "--execute", "--inplace", "--log-level=ERROR", repository / "out" / path.name)
    python("-m", "nbconvert", *map(str, execute))
    own = repository / "reports"
    assert (own / "smoke" / "index.html").is_file() and '"num_generations": 2' in (
        own / "tiny/00_tour.json"
    ).read_text()

    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/study/test_results.py")
    assert git("status", "--porcelain", cwd=repository) == ""
