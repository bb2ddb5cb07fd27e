"""arms.py and grpo.py: the deterministic arm moves nothing, micro-batches change nothing, resume changes nothing."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latentlab.advantage import group_advantages
from latentlab.config import ARMS, arm_settings
from latentlab.grpo import Splitter, policy_gradient
from latentlab.loss import LOSS_TYPES, grpo_loss
from latentlab.masks import MaskSpec, draw_masks
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model, model_from_config
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout
from latentlab.training import arms, run
from latentlab.training.arms import fit_grpo
from latentlab.training.run import read_metrics
from tests.conftest import BACKBONES, sharpen, tiny_gpt2
from tests.training.test_curriculum import Interrupted, interrupt_at


def graded(text, problem):
    """A reward that random models earn too: how many different words."""
    return float(len(set(text.split())))


def weights(model):
    return {name: value.clone() for name, value in model.lm.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


# -- arms -----------------------------------------------------------------------------------------------------------


def test_each_arm_has_its_mask_and_temperature(config):
    g = config(grpo={"temperature": 0.8, "mask": {"rate": 0.2, "scope": "all", "sites": ["mlp"]}}).grpo
    mask = {scheme: MaskSpec(scheme, 0.2, ("mlp",), "all") for scheme in ("shared", "per_step")}
    assert {arm: arm_settings(g, arm) for arm in ARMS} == {
        "none": (None, 0.0),
        "temperature": (None, 0.8),
        "shared": (mask["shared"], 0.8),
        "per_step": (mask["per_step"], 0.8),
        "shared_greedy": (mask["shared"], 0.0),
        "antithetic": (MaskSpec("antithetic", 0.2, ("mlp",), "all"), 0.8),
        "gaussian": (MaskSpec("shared", 0.2, ("embedding",), "all", "gaussian"), 0.8),
        "supervised": (None, 0.8),
    }


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "supervised"])
def test_an_arm_rolls_out_with_its_settings(config, word_sets, tmp_path, monkeypatch, arm):
    seen, original = [], arms.rollout
    monkeypatch.setattr(arms, "rollout", lambda *a, **kw: (seen.append(original(*a, **kw)), seen[-1])[1])
    c = config(grpo={"arm": arm, "mask": {"rate": 0.4}})
    fit_grpo(sharpen(model_from_config(c)), *word_sets, c, out=tmp_path / "run", reward=graded)
    mask, temperature = arm_settings(c.grpo, arm)
    assert (mask is None) is (arm in ("none", "temperature"))
    assert [out.temperature for out in seen] == [temperature] * 4
    assert [out.masks and out.masks.spec for out in seen] == [mask] * 4
    assert len({tuple(out.seeds.tolist()) for out in seen}) == 4
    lines = read_metrics(tmp_path / "run")[1:]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["rollouts"] for line in lines] == [12, 24, 36, 48]
    assert all(line["replay_gap"] < 1e-5 and line["ratio_max_deviation"] < 1e-5 for line in lines)
    assert (lines[0]["grad_norm"] > 0) is (arm != "none")


def test_the_supervised_arm_lowers_the_loss_of_right_answers(config, word_sets, tmp_path):
    c = config(grpo={"arm": "supervised", "learning_rate": 1.0e-2, "steps": 6})
    fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[1]["loss"] - 0.5


# -- the deterministic arm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_without_noise_advantage_and_every_gradient_are_exactly_zero(make_model, problems, config, name):
    """The backward pass runs; what it leaves in .grad is 0.0 for every parameter, not None and not 1e-9."""
    model = make_model(name)
    out = rollout(model, problems, num_generations=8, masks=None, temperature=0.0, run_seed=0, step=0)
    groups = out.thoughts.unflatten(0, (-1, 8))
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    for reward in (exact_answer, graded, lambda text, problem: 0.1 * len(text)):
        advantages = group_advantages(out.rewards(reward))
        assert torch.count_nonzero(advantages) == 0
        policy_gradient(model, out, advantages.flatten().to(out.logp), config(), whole=True)
        assert all(torch.count_nonzero(grad) == 0 for grad in gradients(model).values())
    noisy = rollout(model, problems, num_generations=8, masks=MaskSpec(rate=0.3), temperature=1.0, run_seed=0, step=0)
    policy_gradient(model, noisy, group_advantages(noisy.rewards(graded)).flatten().to(noisy.logp), config())
    assert all(torch.count_nonzero(grad) > 0 for grad in gradients(model).values())


def test_ten_steps_of_arm_none_leave_every_weight_bit_identical(config, word_sets, tmp_path):
    c = config(grpo={"arm": "none", "steps": 10, "learning_rate": 1.0e-2})
    model = model_from_config(c)
    before = weights(model)
    fit_grpo(model, *word_sets, c, out=tmp_path / "run", reward=graded)
    last = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert last["progress"]["step"] == 10
    assert same(weights(model), before) and same(last["model"], before)
    lines = read_metrics(tmp_path / "run")[1:]
    assert [line["grad_norm"] for line in lines] == [0.0] * 10
    assert [line["frac_reward_zero_std"] for line in lines] == [1.0] * 10


def test_arm_shared_moves_them(config, word_sets, tmp_path):
    c = config(grpo={"arm": "shared", "steps": 2})
    model = model_from_config(c)
    before = weights(model)
    fit_grpo(model, *word_sets, c, out=tmp_path / "run", reward=graded)
    assert not same(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"], before)


# -- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss_type", "level"), [*((name, "token") for name in LOSS_TYPES), ("dr_grpo", "sequence")])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_micro_batches_leave_gradient_and_stats_as_they_are(problems, config, loss_type, level, beta):
    model = tiny_gpt2().double()
    reference = tiny_gpt2(seed=1).double().requires_grad_(False) if beta else None
    out = rollout(model, problems, num_generations=4, masks=MaskSpec(rate=0.3), temperature=1.0, run_seed=0, step=0)
    out.logp.add_(torch.arange(out.logp.numel()).sin().view_as(out.logp) * out.token_mask)  # so that ratios clip
    advantages = group_advantages(out.rewards(graded)).flatten()
    results, bound = [], 1.2 if loss_type == "cispo" else 0.2
    for micro_batch in (0, 1, 3):
        settings = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "epsilon_high": bound}
        c = config(grpo={**settings, "micro_batch": micro_batch})
        stats = policy_gradient(model, out, advantages, c, reference=reference)
        results.append((stats, gradients(model)))
    names = ["cispo_clip_ratio"] if loss_type == "cispo" else ["clip_ratio/low_mean", "clip_ratio/high_mean"]
    assert all(results[0][0][name] > 0 for name in names)
    assert (results[0][0]["kl"] > 0) is bool(beta)
    for stats, grads in results[1:]:
        assert stats == pytest.approx(results[0][0], abs=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"importance_sampling_level": "sequence"},
        {"epsilon": 0.05},
        {"epsilon_high": 0.05},
    ],
)
def test_every_setting_of_the_loss_reaches_it(problems, config, settings):
    model = tiny_gpt2().double()
    out = rollout(model, problems, num_generations=4, masks=MaskSpec(rate=0.3), temperature=1.0, run_seed=0, step=0)
    out.logp.add_(torch.arange(out.logp.numel()).sin().view_as(out.logp) * out.token_mask)
    advantages = group_advantages(out.rewards(graded)).flatten()
    given = (model.score(out, masks=out.masks), out.logp, advantages, out.token_mask)
    want, default = (
        grpo_loss(*given, max_completion_length=model.max_new_tokens, **changes)[0].item() for changes in (settings, {})
    )
    got = policy_gradient(model, out, advantages, config(grpo=settings))["loss"]
    assert got == pytest.approx(want, abs=1e-12) and got != pytest.approx(default, abs=1e-6)


def test_a_memory_budget_splits_the_update_and_leaves_its_gradient_as_it_is(problems, config):
    """The longest question goes first and alone, to be measured; the rest in as few parts as the budget allows."""
    model, sizes = tiny_gpt2().double(), []
    out = rollout(model, problems, num_generations=4, masks=MaskSpec(rate=0.3), temperature=1.0, run_seed=0, step=0)
    advantages = group_advantages(out.rewards(graded)).flatten()
    policy_gradient(model, out, advantages, config())
    whole = gradients(model)
    score = model.score
    model.score = lambda part, masks: (
        sizes.append([len(part.problems), part.prompt_ids.shape[1]]),
        score(part, masks=masks),
    )[1]
    for gib in (1.0, 1e-9, 1.8e-3):
        sizes.clear()
        policy_gradient(model, out, advantages, config(grpo={"memory_gib": gib}))
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, whole[name], rtol=0, atol=1e-12)
        widths = sorted(out.prompt_valid.sum(1).tolist(), reverse=True)
        expected = {1.0: [1, 3], 1e-9: [1, 1, 1, 1]}.get(gib, [1, 2, 1])
        starts = [sum(expected[:i]) for i in range(len(expected))]
        assert sizes == [[n, widths[at]] for n, at in zip(expected, starts, strict=True)]


def test_what_is_counted_is_what_autograd_holds(problems):
    """One linear map: its input is saved for the weight's gradient, the weight itself is not counted."""
    model = tiny_gpt2()
    out = rollout(model, problems[:1], num_generations=2, masks=None, temperature=1.0, run_seed=0, step=0)
    splitter = Splitter(model, out, range(len(out.problems)), micro_batch=0, memory_gib=1.0)
    splitter.logits = 0
    x, weight = torch.zeros(2**20, 4, requires_grad=True), model.lm.transformer.wte.weight
    with splitter.measured():
        (x @ weight[:4, :4]).exp()  # saves x and its own result, 16 MiB each
    assert splitter.size == 1 and splitter.most == 1
    splitter.most, splitter.budget = 100, 2.0**30
    with splitter.measured():
        (x @ weight[:4, :4]).exp()
    assert splitter.size == 32


def test_the_budget_is_shared_by_what_is_saved_and_by_the_logits(problems):
    """Per group 4 KiB that autograd saves, and log-softmax's float32 gradients and values for each answer token."""
    model = tiny_gpt2()
    out = rollout(model, problems, num_generations=3, masks=None, temperature=1.0, run_seed=0, step=0)
    group = 4096 + 2 * 4 * 3 * out.tokens.shape[1] * model.lm.config.vocab_size
    for budget, groups in ((3 * group, 3), (3 * group - 1, 2), (group // 2, 1), (99 * group, 4)):
        splitter = Splitter(model, out, range(len(out.problems)), micro_batch=0, memory_gib=budget / 2**30)
        with splitter.measured():
            torch.zeros(1024, requires_grad=True).exp()
        assert (splitter.size, splitter.most, splitter.budget) == (groups, 4, 0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_groups_without_a_signal_leave_the_update_and_nothing_else_changes(problems, config, loss_type):
    model, scored = tiny_gpt2().double(), []
    out = rollout(model, problems, num_generations=4, masks=MaskSpec(rate=0.3), temperature=1.0, run_seed=0, step=0)
    out.logp.add_(torch.arange(out.logp.numel()).sin().view_as(out.logp) * out.token_mask)  # so that ratios clip
    out.logp[4, 0] += 3.0  # of the second group
    advantages = group_advantages(out.rewards(graded))
    advantages[1::2] = 0.0
    score = model.score
    model.score = lambda part, masks: (scored.extend(p.id for p in part.problems), score(part, masks=masks))[1]
    c = config(grpo={"loss_type": loss_type, "epsilon_high": 1.2 if loss_type == "cispo" else 0.2})
    results = []
    for whole in (False, True):
        scored.clear()
        stats = policy_gradient(model, out, advantages.flatten(), c, whole=whole)
        assert sorted(scored) == sorted(p.id for p in (problems if whole else problems[::2]))
        results.append((stats, gradients(model)))
    (part, grads), (full, full_grads) = results
    assert part.keys() == full.keys()
    of_scored = ("replay_gap", "ratio_max_deviation")
    assert {k: v for k, v in part.items() if k not in of_scored} == pytest.approx(
        {k: v for k, v in full.items() if k not in of_scored}, abs=1e-12
    )
    assert part["replay_gap"] < full["replay_gap"]  # the largest, above, is in a group that was left out
    for name, grad in full_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-12)
    scored.clear()
    stats = policy_gradient(model, out, torch.zeros_like(advantages).flatten(), c)
    assert not scored and all(p.grad is None for p in model.parameters())
    assert stats == {"loss": 0.0, "replay_gap": 0.0, "entropy": pytest.approx(full["entropy"])}
    beta = config(grpo={"loss_type": loss_type, "epsilon_high": 1.2, "beta": 0.1})
    policy_gradient(model, out, advantages.flatten(), beta, reference=tiny_gpt2(seed=1).double())
    assert len(scored) == len(problems)  # the KL term has a gradient everywhere


def test_a_batch_without_any_signal_is_scored_whole_so_that_the_optimizer_steps(
    config, word_sets, tmp_path, monkeypatch
):
    real, whole = arms.policy_gradient, []
    monkeypatch.setattr(arms, "policy_gradient", lambda *a, **k: (whole.append(k["whole"]), real(*a, **k))[1])
    c = config(grpo={"steps": 3, "eval_every": 9})
    fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run", reward=lambda text, problem: 1.0)
    assert whole == [True] * 3


def test_the_group_with_the_most_positions_is_measured_first(problems):
    """Without masks equal answers are run once: the longest question need not be the largest group."""
    model = tiny_gpt2()
    out = rollout(model, problems, num_generations=4, masks=None, temperature=1.0, run_seed=0, step=0)
    longest = int(out.prompt_valid.sum(1).argmax())
    tokens = out.tokens.clone().unflatten(0, (-1, 4))
    tokens[:] = torch.tensor([[4, 4], [4, 5], [5, 4], [5, 5]]).repeat(1, 3)[:, : tokens.shape[2]]
    tokens[longest] = torch.arange(4, 4 + tokens.shape[2])  # four equal answers of different tokens
    tokens = tokens.flatten(0, 1)
    for masks, same_passes, first in ((None, False, False), (None, True, True), (MaskSpec(rate=0.1), False, True)):
        drawn = None if masks is None else draw_masks(masks, model, out.seeds)
        model.same_passes = same_passes
        splitter = Splitter(model, replace(out, tokens=tokens, masks=drawn), range(4), micro_batch=1, memory_gib=0.0)
        assert (splitter.left[0] == longest) is first


def test_all_groups_are_scored_where_a_validation_follows(config, word_sets, tmp_path, monkeypatch):
    real, whole = arms.policy_gradient, []
    monkeypatch.setattr(arms, "policy_gradient", lambda *a, **k: (whole.append(k["whole"]), real(*a, **k))[1])
    c = config(grpo={"steps": 5, "eval_every": 3})
    fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run", reward=graded)
    lines = read_metrics(tmp_path / "run")[1:]
    assert whole == ["validation_accuracy" in line for line in lines] == [False, False, True, False, True]


def test_the_gradient_is_the_weighted_score_function(problems, config):
    """On policy: minus the mean of A_k grad log pi(y_k | x, m_k) over rows, divided by the longest answer."""
    model = tiny_gpt2().double()
    out = rollout(model, problems, num_generations=4, masks=MaskSpec(rate=0.3), temperature=1.0, run_seed=0, step=0)
    advantages = group_advantages(out.rewards(graded)).flatten()
    policy_gradient(model, out, advantages, config())
    got = gradients(model)
    (-(advantages * model.score(out, masks=out.masks).sum(1)).sum() / (16 * model.max_new_tokens)).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-12)


def test_a_wrong_mask_in_the_update_shows_in_the_logged_gap(config, word_sets, tmp_path, monkeypatch):
    score = LatentReasoner.score
    monkeypatch.setattr(LatentReasoner, "score", lambda self, out, masks: score(self, out, masks=None))
    c = config(grpo={"steps": 2, "mask": {"rate": 0.3}})
    fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run", reward=graded)
    assert all(line["replay_gap"] > 1e-5 for line in read_metrics(tmp_path / "run")[1:])


# -- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_and_returns_the_weights_that_were_best_on_validation(config, word_sets, tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.6, 0.4])  # before the first step, after steps 2 and 4
    saved = []
    best = arms.Run.save_best
    monkeypatch.setattr(arms.Run, "save_best", lambda run, *a: (saved.append(weights(run.model)), best(run, *a)))
    monkeypatch.setattr(run, "evaluate", lambda *a, **kw: type("E", (), {"accuracy": next(accuracies)}))
    c = config()
    model = model_from_config(c)
    before = weights(model)
    summary = fit_grpo(model, *word_sets, c, out=tmp_path / "run", reward=graded)
    assert summary["validation_accuracy"] == 0.6 and summary["rollouts"] == 48
    assert len(saved) == 2 and same(saved[0], before)
    assert same(weights(model), saved[1])
    assert not same(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"], saved[1])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best")
    assert same(plain.state_dict(), saved[1])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "best")) == len(model.tokenizer)
    assert json.loads((tmp_path / "run" / "best" / "latentlab.json").read_text())["num_thoughts"] == 2


@pytest.mark.parametrize(
    ("name", "call"), [("policy_gradient", 1), ("rollout", 3), ("policy_gradient", 8), ("evaluate", 3)]
)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(config, word_sets, tmp_path, monkeypatch, name, call, beta):
    c = config(grpo={"num_iterations": 2, "beta": beta, "learning_rate": 1.0e-3, "warmup_steps": 3})
    initial = model_from_config(c)
    whole = copy.deepcopy(initial)
    expected = fit_grpo(whole, *word_sets, c, out=tmp_path / "whole", reward=graded)
    with monkeypatch.context() as killed, pytest.raises(Interrupted):
        interrupt_at(killed, run if name == "evaluate" else arms, name, call)
        fit_grpo(copy.deepcopy(initial), *word_sets, c, out=tmp_path / "run", reward=graded)
    resumed = copy.deepcopy(initial)
    assert fit_grpo(resumed, *word_sets, c, out=tmp_path / "run", reward=graded, resume=True) == expected
    assert same(weights(whole), weights(resumed))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "run")]
    assert same(states[0]["model"], states[1]["model"])
    for a, b in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    model = model_from_config(c)
    assert fit_grpo(model, *word_sets, c, out=tmp_path / "run", reward=graded, resume=True) == expected


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_nan_keeps_the_last_good_checkpoint(config, word_sets, tmp_path, monkeypatch, iterations):
    """Injected into the last update before a checkpoint: with two updates a batch, into the second."""
    original, calls = arms.policy_gradient, [0]

    def poisoned(model, *args, **kwargs):
        calls[0] += 1
        stats = original(model, *args, **kwargs)
        if calls[0] == 4 * iterations:
            model.lm.transformer.ln_f.weight.grad[0] = float("nan")
        return stats

    monkeypatch.setattr(arms, "policy_gradient", poisoned)
    c = config(grpo={"num_iterations": iterations})
    with pytest.raises(FloatingPointError, match="^grad_norm: got nan at step 3"):
        fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run", reward=graded)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 2 and all(torch.isfinite(w).all() for w in state["model"].values())
    best = load_model(str(tmp_path / "run" / "best"))
    assert all(torch.isfinite(p).all() for p in best.parameters())
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [-1, 0, 1, 2]


def test_a_nan_reward_stops_the_run_before_the_update(config, word_sets, tmp_path):
    c = config()
    model = model_from_config(c)
    before = weights(model)
    with pytest.raises(
        ValueError, match="^grpo at step 0, reward of problem word-train-.*: got nan, .*correct the reward"
    ):
        fit_grpo(model, *word_sets, c, out=tmp_path / "run", reward=lambda text, problem: float("nan"))
    assert same(weights(model), before)


def test_wrong_use_is_one_line(config, word_sets, tmp_path):
    c = config(grpo={"steps": 1})
    for train, validation in (([], word_sets[1]), (word_sets[0], [])):
        with pytest.raises(ValueError, match="^data: got .* expected both"):
            fit_grpo(model_from_config(c), train, validation, c, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    with pytest.raises(FileExistsError, match="^run folder"):
        fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"^resume: got grpo\.num_problems=4, expected 3 "):
        changed = config(grpo={"steps": 1, "num_problems": 4})
        fit_grpo(model_from_config(c), *word_sets, changed, out=tmp_path / "run", resume=True)


def test_an_idle_process_makes_the_passes_of_a_micro_batch_and_no_gradient(make_model, problems):
    model, reference, seen = make_model("gpt2"), make_model("gpt2").requires_grad_(False), []
    for each in (model, reference):
        each.same_passes = True
        each.lm.base_model.register_forward_hook(lambda module, _, __: seen.append(module))
    out = rollout(model, problems[:1], num_generations=2, masks=None, temperature=1.0, run_seed=0, step=0)
    seen.clear()
    for each in (model, reference):
        each.score(out, masks=None)
    passes = list(seen)
    seen.clear()
    loss = arms._idle_loss(model, reference)
    assert seen == passes and loss.item() == 0
    loss.backward()
    assert all(torch.count_nonzero(grad) == 0 for grad in gradients(model).values())
