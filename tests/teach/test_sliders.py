"""sliders.py: closed forms equal the enumeration, a moved slider changes what is shown, the fallback says the same."""

import math

import pytest
from ipywidgets.widgets.widget import _instances

from latentlab.teach import playground, sliders
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
    monkeypatch.setattr(playground, "display", lambda bundle, raw: displayed.append(bundle))
    sliders.mixed_groups(4, 0.2)
    bundle = displayed[0]
    assert "K = 4, q = 0.20" in bundle["text/html"] and "K = 4, q = 0.20" in bundle["text/plain"]
    box = _instances[bundle["application/vnd.jupyter.widget-view+json"]["model_id"]]
    k, rate, shown = box.children
    k.value, rate.value = 16, 0.5
    assert "K = 16, q = 0.50" in shown.value
