"""sliders.py: closed forms equal the enumeration, a moved slider changes what is shown, the fallback says the same."""

import math

import ipywidgets
import pytest
from ipywidgets.widgets.widget import _instances

from latentlab.teach import sliders
from latentlab.theory import enumeration, moments


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_closed_forms_equal_the_enumeration(k, rate):
    row = moments.variance_row(enumeration.one_logit(rate), moments.ONE_LOGIT_REWARDS, k)
    assert sliders.variance_ratio(k, rate) == pytest.approx(row["leave_one_out"] / row["none"], rel=1e-9)
    patterns = sum(rate**c * (1 - rate) ** (k - c) * math.comb(k, c) for c in range(1, k))
    assert sliders.mixed_share(k, rate) == pytest.approx(patterns)


def test_the_verdict_turns_at_the_crossover():
    limit = moments.crossover(8)
    assert "lowers" in str(sliders.mixed_table(8, limit - 0.01))
    assert "raises" in str(sliders.mixed_table(8, limit + 0.01))
    assert f"= {limit:.2f}" in str(sliders.mixed_table(8, 0.5))


def test_a_moved_slider_changes_the_table_and_the_fallback_is_the_default(monkeypatch):
    displayed = []
    monkeypatch.setattr(sliders, "display", lambda bundle, raw: displayed.append(bundle))
    control = ipywidgets.IntSlider(8, 2, 64)
    sliders.show(lambda k: sliders.mixed_table(k, 0.7), [control])
    bundle = displayed[0]
    assert "K = 8" in bundle["text/html"] and "K = 8" in bundle["text/plain"]
    box = _instances[bundle["application/vnd.jupyter.widget-view+json"]["model_id"]]
    control.value = 16
    assert "K = 16" in box.children[1].value


def test_mixed_groups_shows_two_sliders(monkeypatch):
    shown = []
    monkeypatch.setattr(sliders, "show", lambda content, controls: shown.extend([content, *controls]))
    sliders.mixed_groups(4, 0.2)
    assert shown[0] is sliders.mixed_table and [control.value for control in shown[1:]] == [4, 0.2]
