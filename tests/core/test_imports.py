"""Layers (contracts in pyproject.toml), public names, and a command line that starts fast."""

import subprocess
import sys
from pathlib import Path

import pytest

import latentlab
from latentlab import cli

ROOT = Path(latentlab.__file__).parents[1]
HEAVY = {"torch", "transformers", "datasets", "tyro", "pydantic", "papermill", "scipy"}


def test_no_layer_imports_a_higher_one_and_the_method_no_sub_package():
    pytest.importorskip("importlinter", reason="import-linter comes with the extra dev")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("words", ["", "-h", "--help", "fly"])
def test_the_overview_and_unknown_verbs_load_nothing_heavy(words):
    code = (
        "import sys, latentlab.cli; code = latentlab.cli.main(sys.argv[1:]);"
        f" print(); print(*sorted({HEAVY!r} & set(sys.modules)), 'code', code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == f"code {2 if words == 'fly' else 0}", done


def test_every_verb_is_a_class_and_stands_in_the_overview():
    from latentlab.study import verbs

    assert all(issubclass(getattr(verbs, verb.capitalize()), verbs.Verb) for verb in cli.VERBS)
    assert [line.split()[0] for line in cli.__doc__.splitlines() if line.startswith("    ")] == list(cli.VERBS)


def test_the_public_names_are_those_of_their_modules():
    from latentlab import grpo, rollouts

    assert latentlab.rollout is rollouts.rollout and latentlab.policy_gradient is grpo.policy_gradient
    for name in latentlab.__all__:
        assert getattr(latentlab, name) is not None and name in dir(latentlab)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        latentlab.nothing  # noqa: B018
