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
    environment["HF_HUB_OFFLINE"] = "1"  # nothing waits for the network

    def python(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(
            command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def expect_success(*processes):
        printed = "\n".join([process.communicate()[0].decode() for process in processes])
        assert not any(process.returncode for process in processes), printed

    path = repository / "notebooks" / "00_tour.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "\nnum_generations = 2"
    (repository / "out").mkdir()
    nbformat.write(notebook, repository / "out" / path.name)
    patience = "--ExecutePreprocessor.startup_timeout=600"  # on a busy machine kernels start slowly
    execute = ("--to", "notebook", "--execute", "--inplace", "--log-level=ERROR", patience)
    by_hand = python("-m", "nbconvert", *execute, repository / "out" / path.name)  # of preset tiny: no file is shared
    expect_success(python("-m", "latentlab", "study", "--preset", "smoke"), by_hand)
    own = repository / "reports"
    assert (own / "smoke" / "book" / "index.html").is_file()
    assert '"num_generations": 2' in (own / "tiny" / "00_tour.json").read_text()

    # Without the suite's conftest: these tests use none of it, and its imports are slow.
    words = ("-q", "-p", "no:cacheprovider", "--noconftest", "tests/study/test_results.py")
    expect_success(python("-m", "pytest", *words))
    assert git("status", "--porcelain", cwd=repository) == ""
