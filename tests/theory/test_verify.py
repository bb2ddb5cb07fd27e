"""`latentlab verify` is green on this machine, and each mistake it is meant to find turns its row red."""

import json
import math
from dataclasses import replace

import pytest
import torch

from latentlab import advantage, model
from latentlab.masks import Masks
from latentlab.model import LatentReasoner
from latentlab.theory import enumeration, proofs
from latentlab.verify import engine, table

ENGINE = ("replay", "mask_identity", "mask_statistics", "batch_invariance", "naive_equality")


def test_every_property_holds_in_float64():
    rows = table.run_verify("cpu", "float64")
    assert [p.name for p in rows] == list(table.NAMES) and len(rows) == 16
    assert not [p for p in rows if not p.ok]


@pytest.mark.parametrize(("dtype", "names"), [("float32", ENGINE), ("bfloat16", ("replay", "mask_identity"))])
def test_the_engine_holds_in_lower_precision(dtype, names):
    rows = table.run_verify("cpu", dtype, only=names)
    assert not [p for p in rows if not p.ok] and rows[0].bound == engine.BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_engine_holds_on_cuda(dtype):
    assert not [p for p in table.run_verify("cuda", dtype, only=ENGINE) if not p.ok]


def flip_sign(patch):
    real = advantage.group_advantages
    patch.setattr(advantage, "group_advantages", lambda *a, **k: -real(*a, **k))


def add_std_scaling(patch):
    real = advantage.group_advantages
    patch.setattr(advantage, "group_advantages", lambda rewards, **k: real(rewards, **{**k, "scale": "group"}))


def redraw_masks(patch):
    real = LatentReasoner.score

    def score(self, rollouts, *, masks):
        return real(self, rollouts, masks=masks and Masks(masks.values.roll(1, 0), masks.spec))

    patch.setattr(LatentReasoner, "score", score)


def cut_gradient(patch):
    real = LatentReasoner.think
    patch.setattr(LatentReasoner, "think", lambda self, state: real(self, state, edit=lambda i, z: z.detach()))


def drop_eos(patch):
    real = LatentReasoner.score
    patch.setattr(
        LatentReasoner, "score", lambda self, r, *, masks: real(self, r, masks=masks) * (r.tokens != self.eos_id)
    )


def score_nan_once(patch):
    real = LatentReasoner.score

    def score(self, r, *, masks):
        return real(self, r, masks=masks) * (math.nan if r.num_generations == 1 else 1)

    patch.setattr(LatentReasoner, "score", score)


def attend_to_padding(patch):
    real = model.RolloutCache
    patch.setattr(model, "RolloutCache", lambda valid, capacity: real(torch.ones_like(valid), capacity))


@pytest.mark.parametrize(
    ("mutate", "red"),
    [
        (flip_sign, ("score_function", "mean_baseline", "leave_one_out")),
        (add_std_scaling, ("mean_baseline", "leave_one_out")),
        (redraw_masks, ("replay",)),
        (cut_gradient, ("latent_gradient",)),
        (drop_eos, ("score_function", "replay")),
        (score_nan_once, ("replay", "mask_identity")),
        (attend_to_padding, ("batch_invariance", "naive_equality")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_turns_its_rows_red(mutate, red, monkeypatch):
    mutate(monkeypatch)
    for dtype in ("float64", "float32") if set(red) & set(ENGINE) else ("float64",):
        assert not [p for p in table.run_verify("cpu", dtype, only=red) if p.ok]


def test_a_property_that_cannot_run_is_red(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(engine.CHECKS, "replay", lambda engine: 1 / 0)
    (row,) = table.run_verify(only=["replay"])
    assert not row.ok and math.isnan(row.value) and "ZeroDivisionError" in row.note
    monkeypatch.setattr(table, "run_verify", lambda device, dtype: [row])
    assert table.main("cpu", "float64", tmp_path / "v.json") == 1 and "NO" in capsys.readouterr().out
    assert json.loads((tmp_path / "v.json").read_text())["properties"][0]["value"] is None


def test_main_writes_json_and_returns_the_exit_code(tmp_path, monkeypatch, capsys):
    rows = [proofs.judge("a", 1e-12, 1e-10), proofs.judge("b", 2.0, 1.0)]
    monkeypatch.setattr(table, "run_verify", lambda device, dtype: rows[:1] if dtype == "float64" else rows)
    assert table.main("cpu", "float64", None) == 0
    assert table.main("cpu", "float32", str(tmp_path / "v.json")) == 1
    written = json.loads((tmp_path / "v.json").read_text())
    assert [(p["name"], p["value"], p["bound"], p["ok"]) for p in written["properties"]] == [
        ("a", 1e-12, 1e-10, True),
        ("b", 2.0, 1.0, False),
    ]
    assert written["environment"]["torch"] == torch.__version__ and written["dtype"] == "float32"
    assert "1 of 2 properties hold" in capsys.readouterr().out


def test_nan_is_never_ok():
    assert not proofs.judge("a", math.nan, 1.0).ok and not proofs.judge("a", math.nan, 1.0, at_least=True).ok


def test_a_nan_in_one_problem_is_red():
    x = enumeration.example()
    x = replace(x, gradients=(x.gradients[0], x.gradients[1] * math.nan))
    assert not any(proofs.PROOFS[name](x).ok for name in ("mean_baseline", "std_scaling"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "float16"}, "dtype: got 'float16'"),
        ({"only": ["speed"]}, "property 'speed'"),
        ({"device": "tpu"}, "device: got 'tpu'"),
    ],
)
def test_bad_arguments_are_one_line(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        table.run_verify(**given)
    assert "\n" not in str(caught.value)
