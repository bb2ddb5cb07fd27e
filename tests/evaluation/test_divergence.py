"""thoughts.py: how many groups think differently, and what noise costs and buys."""

import pytest

from latentlab.data.word_problems import word_problems
from latentlab.evaluation import thoughts
from latentlab.evaluation.collapse import measure_groups
from latentlab.masks import MaskSpec
from latentlab.pretrained.loading import load_model
from latentlab.rollouts import rollout
from tests.conftest import small_config


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def problems():
    return word_problems("validation", 8, seed=0)


def test_equal_thoughts_never_differ(model, problems):
    assert thoughts.thought_divergence(model, problems, mask=None, num_generations=3, run_seed=0) == [0.0] * 4


def test_the_share_counts_groups_with_any_other_token(model, problems):
    mask, settings = MaskSpec(rate=0.3), {"num_generations": 3, "run_seed": 0}
    out = rollout(model, problems, masks=mask, temperature=0.0, step=0, **settings)
    tokens = model.head(out.thoughts).argmax(-1).view(len(problems), 3, -1).tolist()
    differ = [sum(len({row[i] for row in group}) > 1 for group in tokens) / len(problems) for i in range(4)]
    assert any(0 < share < 1 for share in differ)
    assert thoughts.thought_divergence(model, problems, mask=mask, **settings) == pytest.approx(differ)


def test_diversity_agrees_with_measure_groups(model, problems):
    mask, settings = MaskSpec(rate=0.3), {"num_generations": 4, "run_seed": 0, "temperature": 1.0}
    found = thoughts.diversity(model, problems, mask=mask, **settings)
    groups = measure_groups(model, problems, small_config(), mask=mask, batch_size=4, **settings)
    assert found["mean"] == pytest.approx(groups["reward"])
    assert found["mixed"] == pytest.approx(1 - groups["frac_reward_zero_std"])
    assert found["answers"] == groups["distinct_answers"]
    assert 1 < found["trains"] <= 4 and found["pass@k"] >= found["mean"]
    assert thoughts.diversity(model, problems, mask=None, **settings)["trains"] == 1
