"""LoRA in both loops: the base stays bit for bit, runs hold the adapter alone, the KL is to the starting policy."""

import json

import pytest
import torch

from latentlab.pretrained import load_model, merge_adapter, save_model
from latentlab.pretrained.adapters import attach_adapter
from latentlab.runtime.environment import repository_root
from latentlab.training import arms
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import fit_curriculum
from latentlab.training.run import read_metrics
from latentlab.training.steps import frozen_copy, trained
from tests.conftest import small_config
from tests.reliability.processes import TRAIN, VALIDATION, together
from tests.training.test_arms import graded, same, weights

SMOLLM2 = repository_root() / "data" / "downloads" / "smollm2"


@pytest.fixture(params=["gpt2", "llama"])
def base(request, make_model, tmp_path):
    save_model(make_model(request.param), tmp_path / "base")
    return tmp_path / "base"


def lora_config(**changes):
    return small_config(**{"lora": {"r": 4}, "curriculum": {"learning_rate": 1e-2}, **changes})


def fit(loop, model, config, out, sets, **options):
    if loop == "curriculum":
        return fit_curriculum(model, *sets, config, out=out, **options)
    return fit_grpo(model, *sets, config, out=out, reward=graded, **options)


GRPO = {"learning_rate": 1e-2, "beta": 0.1, "steps": 3, "num_iterations": 2}


@pytest.mark.parametrize("loop", ["curriculum", "grpo"])
def test_the_base_stays_bit_for_bit_and_the_run_holds_the_adapter_alone(base, loop, tmp_path, word_sets):
    before, model, run = load_model(base), load_model(base), tmp_path / "run"
    fit(loop, model, lora_config(grpo=GRPO), run, word_sets)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in model.parameters())
    names = {key.replace(".base_layer", "").replace(".token_adapter", ""): p for key, p in model.lm.named_parameters()}
    for name, weight in before.lm.named_parameters():
        assert torch.equal(weight, names[name]) and not names[name].requires_grad
    assert len(frozen) == len(list(before.parameters()))
    state = torch.load(run / "state.pt", weights_only=True)
    assert (
        len(state["optimizer"]["state"]) == len(state["optimizer"]["param_groups"][0]["params"]) == len(trained(model))
    )
    assert all("lora_" in name or "trainable_tokens" in name for name in state["model"])
    files = {path.name for path in (run / "best").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "latentlab.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files and "config.json" not in files
    assert same(weights(load_model(run)), weights(model))  # the run folder stands for its best/
    assert loop == "curriculum" or abs(read_metrics(run)[1]["kl"]) < 1e-9  # to the base, which is where it starts
    assert any(value.any() for name, value in state["model"].items() if "lora_B" in name)


@pytest.mark.parametrize(("base", "loop"), [("gpt2", "curriculum"), ("llama", "grpo")], indirect=["base"])
def test_a_killed_run_resumes_bit_for_bit(base, loop, tmp_path, word_sets, monkeypatch):
    config = lora_config(grpo=GRPO)
    whole, model = load_model(base), load_model(base)
    fit(loop, whole, config, tmp_path / "whole", word_sets)
    update = f"latentlab.training.{'arms' if loop == 'grpo' else 'curriculum'}.update"
    original, count = arms.update, iter(range(100))

    def killed(*arguments, **settings):
        if next(count) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(update, killed)
        fit(loop, model, config, tmp_path / "cut", word_sets, checkpoint_minutes=0.0)
    again = load_model(base)
    fit(loop, again, config, tmp_path / "cut", word_sets, resume=True)
    assert same(weights(again), weights(whole))
    for name in ("metrics.jsonl", "best/adapter_model.safetensors", "best/adapter_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    a, b = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("cut", "whole"))
    assert same(a["model"], b["model"]) and str(a["optimizer"]) == str(b["optimizer"])


def test_the_reference_shares_the_base_and_keeps_the_starting_adapter(base):
    model = load_model(base)
    attach_adapter(model, lora_config())
    reference = frozen_copy(model)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reference.parameters()}
    assert shared == {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert all(p.requires_grad for p in trained(model)) and trained(model) and not trained(reference)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_the_kl_is_to_the_starting_policy_when_an_adapter_goes_on(base, tmp_path, word_sets, monkeypatch):
    first = load_model(base)
    fit("curriculum", first, lora_config(), tmp_path / "curriculum", word_sets)
    start, seen, original = weights(first), [], arms.policy_gradient

    def watched(model, *arguments, reference, **settings):
        seen.append(weights(reference))
        return original(model, *arguments, reference=reference, **settings)

    monkeypatch.setattr(arms, "policy_gradient", watched)
    model = load_model(tmp_path / "curriculum")
    fit("grpo", model, lora_config(grpo={**GRPO, "num_iterations": 1}), tmp_path / "grpo", word_sets)
    assert len(seen) == 3 and all(same(reference, start) for reference in seen)
    lines = read_metrics(tmp_path / "grpo")[1:]
    assert abs(lines[0]["kl"]) < 1e-9 and min(abs(line["kl"]) for line in lines[1:]) > 1e-7
    assert max(line["replay_gap"] for line in lines) < 1e-5
    held = json.loads((tmp_path / "grpo" / "best" / "adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == str(base) and held["r"] == 4


def adapter_after_training(base, out):
    config = lora_config(grpo={**GRPO, "num_problems": 4})
    fit("grpo", load_model(base).double(), config, out / "run", (TRAIN, VALIDATION))
    state = torch.load(out / "run" / "state.pt", weights_only=True)["model"]
    return {name: value.numpy() for name, value in state.items()}


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_processes_sum_the_gradients_of_the_adapter(base, tmp_path):
    runs = {n: together(n, adapter_after_training, tmp_path / f"{n}", base=base, out=tmp_path / f"{n}") for n in (1, 2)}
    ((one,), two) = runs.values()
    for other in two:
        assert one.keys() == other.keys()
        assert all(abs(one[name] - other[name]).max() < 1e-9 for name in one)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_another_rank_does_not_resume_and_nothing_is_written_for_a_wrong_target(base, tmp_path, word_sets):
    with pytest.raises(ValueError, match="^lora.targets: got nosuch, expected some of"):
        fit("grpo", load_model(base), lora_config(lora={"r": 4, "targets": ["nosuch"]}), tmp_path / "run", word_sets)
    assert not (tmp_path / "run").exists()
    fit("grpo", load_model(base), lora_config(), tmp_path / "run", word_sets)
    with pytest.raises(ValueError, match=r"^resume: got lora\.r=2, expected 4"):
        fit("grpo", load_model(base), lora_config(lora={"r": 2}), tmp_path / "run", word_sets, resume=True)


@pytest.mark.skipif(not SMOLLM2.exists(), reason="no data/downloads/smollm2; scripts/fetch_smollm2.py makes it")
@pytest.mark.slow
def test_smollm2_takes_grpo_steps(tmp_path, word_sets):
    model = load_model(SMOLLM2, num_thoughts=2, max_new_tokens=4)
    grpo = {"steps": 2, "num_problems": 2, "num_generations": 4, "eval_every": 2, "learning_rate": 1e-3}
    config = lora_config(grpo=grpo, lora={"r": 8})
    fit("grpo", model, config, tmp_path / "run", (word_sets[0], word_sets[1][:1]))
    lines = read_metrics(tmp_path / "run")[1:]
    assert len(lines) == 2 and max(line["replay_gap"] for line in lines) < 2e-4 and lines[1]["grad_norm"] > 0
    size = (tmp_path / "run" / "best" / "adapter_model.safetensors").stat().st_size
    assert size == pytest.approx(4 * sum(p.numel() for p in trained(model)), rel=0.05) and size < 12e6
    again = load_model(tmp_path / "run")
    ids = torch.tensor([[10, 20, again.start_id, again.end_id]])
    with torch.no_grad():
        ours = again.lm(ids).logits
        torch.testing.assert_close(
            merge_adapter(again).lm(ids).logits, ours, rtol=0, atol=2e-4 * float(ours.abs().max())
        )
