"""The import arrows: leaves stand alone, stages import only earlier ones, the command line starts fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "latentlab"
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if not path.stem.startswith("__")}
# One page each, understood alone: they may import nothing of the package but these two.
LEAVES = {"problems", "config", "masks", "advantage", "loss", "statistics", "report", "reward"}
LEAVES |= {"word_problems", "wording", "equations", "smollm2", "hub", "parallel", "attention"}
SHARED = {"problems", "config"}
# Modules import only from their left; training evaluates on its validation problems, so `evaluate` comes before it.
# A new module gets its place here.
ORDER = (
    "problems config parallel hub word_problems wording equations perturb sources statistics masks smollm2 published"
    " backbone attention sites model rollout micro_batch reward evaluate advantage loss report figures copies_report"
    " checkpoint loop curriculum inputs grpo collapse reference enumeration theory proofs checks verify parts"
    " gsm8k_report budget reproduce tables study launch compare sweep timing baselines bench cli"
).split()
HEAVY = {"torch", "transformers", "datasets", "tyro", "papermill"}


def siblings(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, in any of the import forms."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("latentlab.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "latentlab"):
            module = (node.module or "").removeprefix("latentlab").removeprefix(".")
            names |= {module} if module else {alias.name for alias in node.names}
    return {name.split(".")[0] for name in names} & set(MODULES)


IMPORTS = {name: siblings(path) - {name} for name, path in MODULES.items()}


@pytest.mark.parametrize("name", sorted(LEAVES & set(MODULES)))
def test_leaves_stand_alone(name):
    assert IMPORTS[name] <= SHARED, f"{name} is a leaf and may import only {sorted(SHARED)}"


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("name", [name for name in ORDER if name in MODULES])
def test_stages_import_only_earlier_ones(name):
    assert IMPORTS[name] <= set(ORDER[: ORDER.index(name)])


def test_no_cycles():
    left = dict(IMPORTS)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def top_level(body):
    """Statements that run at import: not those inside functions."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from top_level(list(ast.iter_child_nodes(node)))


@pytest.mark.skipif("cli" not in MODULES, reason="the command line does not exist yet")
def test_heavy_imports_stay_inside_the_verbs():
    tree = ast.parse(MODULES["cli"].read_text(encoding="utf-8"))
    found = set()
    for node in top_level(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    assert not found & HEAVY
    code = f"import sys, latentlab.cli; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert not done.stdout.split(), f"importing latentlab.cli imports {done.stdout.strip()} through another module"
