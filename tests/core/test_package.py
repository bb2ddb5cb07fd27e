"""The wheel alone, in an empty folder: public names, presets, checkpoint, command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import latentlab

ROOT = Path(latentlab.__file__).parents[1]
LINES = """
import sys

for extra in ("datasets", "matplotlib", "papermill", "nbformat", "submitit", "accelerate", "gguf"):
    sys.modules[extra] = None  # as where only the core is installed

import latentlab
from latentlab import (
    LatentReasoner, MaskSpec, Problem, draw_masks, evaluate, exact_answer, group_advantages, grpo_loss, load_model,
    load_preset, replay_gap, rollout, rollout_seeds, save_model, word_problems,
)

assert "site" in latentlab.__file__, latentlab.__file__
config = load_preset("tiny")
model = load_model("tiny")
problems = word_problems("validation", 4, seed=0)
out = rollout(model, problems, num_generations=4, masks=MaskSpec(rate=0.1), temperature=1.0, run_seed=0, step=0)
advantages = group_advantages(out.rewards(exact_answer))
logp = model.score(out, masks=out.masks)
assert replay_gap(logp, out) < 1e-5
loss, stats = grpo_loss(
    logp, out.logp, advantages.flatten().float(), out.token_mask, max_completion_length=model.max_new_tokens
)
loss.backward()
save_model(model, "saved")
first, second = (evaluate(m, problems, batch_size=4) for m in (model, load_model("saved")))
assert first.text == second.text
"""


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, comes with the extra dev")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PIP_NO_INDEX": "1"}

    def python(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=tmp_path / "empty", env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "empty").mkdir()
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("latentlab-*.whl")
    assert latentlab.__version__ in wheel.name
    python("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    python("-c", LINES)
    assert "latentlab" in python("-m", "latentlab", "--help")
    assert "properties hold on cpu in float64" in python("-m", "latentlab", "verify", "--dtype", "float64")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["saved"]
