"""diagrams.py: the numbers are the model's, the update shows the masks of the rollouts, schemes differ as they say."""

import pytest
from matplotlib.patches import Rectangle

from latentlab.pretrained.loading import load_model
from latentlab.teach import diagrams
from latentlab.teach.thoughts import show_thoughts


def masks(figure, left, right):
    """The mask bars that begin between two places, by row from the top: lists of face colours."""
    features = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_facecolor()[3]]
    rows: dict[float, list] = {}
    for patch in sorted(features, key=lambda patch: (-round(patch.get_y(), 3), patch.get_x())):
        if left <= patch.get_x() < right:
            rows.setdefault(round(patch.get_y(), 3), []).append(patch.get_facecolor())
    return list(rows.values())


@pytest.fixture(scope="module")
def method():
    return diagrams.method_diagram()


def test_the_method_shows_what_the_model_does(method):
    shown = [text.get_text() for text in method.axes[0].texts]
    table = show_thoughts(load_model("tiny"), diagrams.EXAMPLE, rate=0.1, k=4, seed=1)
    advantages = [train.advantage for train in table.trains[1:]]
    assert any(advantages) and sum(advantages) == pytest.approx(0)
    assert [text for text in shown if text[:1] in "+-"] == [f"{a:+.2f}" for a in advantages]
    for train in table.trains[1:]:
        assert set(train.thoughts) <= set(shown)
        assert f"{train.answer} {'✓' if train.reward else '✗'}" in shown


def test_the_update_wears_the_masks_of_the_rollouts(method):
    rollout, update = masks(method, 2.5, 4), masks(method, 11, 12.5)
    assert len(rollout) == 4 and rollout == update
    assert len({tuple(row) for row in rollout}) == 4


def test_shared_masks_are_held_and_per_step_masks_are_not():
    figure = diagrams.schemes_diagram()
    for left, held in ((0.2, True), (7.0, False)):
        for row in masks(figure, left - 0.1, left + 6.3):
            bars = [row[i : i + diagrams.FEATURES] for i in range(0, len(row), diagrams.FEATURES)]
            assert len(bars) == 5
            assert all(bar == bars[0] for bar in bars) is held
