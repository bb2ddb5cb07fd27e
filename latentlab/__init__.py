"""Dropout-GRPO: reinforcement learning of latent reasoning, where a dropout mask is a value.

The method is one file per step: problems, model (with attention), masks, rollouts, reward,
advantage, loss, grpo; config holds its settings. Everything else is in sub-packages. Read masks.py
and rollouts.py first. The names below can be imported from `latentlab`; each loads at first use.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from latentlab.advantage import group_advantages as group_advantages
    from latentlab.config import Config as Config
    from latentlab.config import load_preset as load_preset
    from latentlab.data.word_problems import word_problems as word_problems
    from latentlab.evaluation.accuracy import evaluate as evaluate
    from latentlab.grpo import policy_gradient as policy_gradient
    from latentlab.loss import grpo_loss as grpo_loss
    from latentlab.masks import Masks as Masks
    from latentlab.masks import MaskSpec as MaskSpec
    from latentlab.masks import draw_masks as draw_masks
    from latentlab.masks import rollout_seeds as rollout_seeds
    from latentlab.model import LatentReasoner as LatentReasoner
    from latentlab.pretrained.loading import load_model as load_model
    from latentlab.pretrained.loading import save_model as save_model
    from latentlab.problems import Problem as Problem
    from latentlab.reward import exact_answer as exact_answer
    from latentlab.rollouts import Rollouts as Rollouts
    from latentlab.rollouts import replay_gap as replay_gap
    from latentlab.rollouts import rollout as rollout

_NAMES = {
    "advantage": ["group_advantages"],
    "config": ["Config", "load_preset"],
    "data.word_problems": ["word_problems"],
    "evaluation.accuracy": ["evaluate"],
    "grpo": ["policy_gradient"],
    "loss": ["grpo_loss"],
    "masks": ["MaskSpec", "Masks", "draw_masks", "rollout_seeds"],
    "model": ["LatentReasoner"],
    "pretrained.loading": ["load_model", "save_model"],
    "problems": ["Problem"],
    "reward": ["exact_answer"],
    "rollouts": ["Rollouts", "replay_gap", "rollout"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'latentlab' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"latentlab.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
