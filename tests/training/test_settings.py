"""Every setting reaches the place where it acts, with its value: what no metric of a run would show."""

import itertools
import json

import pytest
import torch

from latentlab.advantage import group_advantages
from latentlab.grpo import policy_gradient
from latentlab.loss import grpo_loss
from latentlab.masks import MaskSpec, draw_masks, rollout_seeds
from latentlab.pretrained.loading import model_from_config
from latentlab.problems import step_result
from latentlab.rollouts import encode_prompts, rollout
from latentlab.training import arms, curriculum, run
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import (
    curriculum_gradient,
    encode_answers,
    fit_curriculum,
    set_stage,
    stage_text,
)
from latentlab.training.run import read_metrics
from latentlab.training.steps import batch_indices, update, warmup_cosine
from tests.conftest import sharpen, tiny_gpt2
from tests.training.test_arms import graded, gradients, same, weights


@pytest.fixture
def optimizers(monkeypatch):
    """The settings of every AdamW, and its learning rate at each step."""
    made, original = [], torch.optim.AdamW

    class Watched(original):
        def __init__(self, parameters, **settings):
            made.append((settings, []))
            super().__init__(parameters, **settings)
            self.rates = made[-1][1]

        def step(self):
            self.rates.append(self.param_groups[0]["lr"])
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    return made


# -- GRPO -----------------------------------------------------------------------------------------------------------


def test_the_gradient_has_both_clip_bounds_and_the_kl_to_a_reference_under_the_same_masks(problems, config):
    """Against the loss of the recorded rollouts in one piece, with every setting away from its default."""
    model, reference = sharpen(tiny_gpt2()).double(), sharpen(tiny_gpt2(seed=1)).double().requires_grad_(False)
    out = rollout(model, problems, num_generations=4, masks=MaskSpec(rate=0.3), temperature=1.0, run_seed=0, step=0)
    out.logp.add_(torch.arange(out.logp.numel()).sin().view_as(out.logp) * out.token_mask)  # so that ratios clip
    advantages = group_advantages(out.rewards(graded)).flatten()
    settings = {"epsilon": 0.1, "epsilon_high": 0.5, "beta": 0.3}
    got = policy_gradient(model, out, advantages, config(grpo={**settings, "micro_batch": 3}), reference=reference)
    grads = gradients(model)
    given = (model.score(out, masks=out.masks), out.logp, advantages, out.token_mask)
    ref_logp = reference.score(out, masks=out.masks)
    limit = {"max_completion_length": model.max_new_tokens}
    loss, stats = grpo_loss(*given, ref_logp=ref_logp, **limit, **settings)
    loss.backward()
    assert got["loss"] == pytest.approx(loss.item(), abs=1e-12)
    assert {name: got[name] for name in stats} == pytest.approx(stats, abs=1e-12)
    assert got["entropy"] == pytest.approx(out.entropy.sum().item() / int(out.token_mask.sum()))
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-12)
    for changes in ({"epsilon": 0.2}, {"epsilon_high": 0.1}, {"beta": 0.1}):  # each of them acts here
        assert abs(grpo_loss(*given, ref_logp=ref_logp, **limit, **{**settings, **changes})[0] - loss) > 1e-3
    unmasked = grpo_loss(*given, ref_logp=reference.score(out, masks=None), **limit, **settings)[0]
    assert abs(unmasked - loss) > 1e-5


def test_the_reference_stays_the_initial_model(config, word_sets, tmp_path, monkeypatch):
    seen, original = [], arms.policy_gradient

    def watched(model, *args, reference, **settings):
        seen.append((weights(reference), weights(model)))
        return original(model, *args, reference=reference, **settings)

    monkeypatch.setattr(arms, "policy_gradient", watched)
    c = config(grpo={"beta": 0.1, "steps": 3, "learning_rate": 1e-2})
    model = sharpen(model_from_config(c))
    before = weights(model)
    fit_grpo(model, *word_sets, c, out=tmp_path / "run", reward=graded)
    assert len(seen) == 3 and all(same(reference, before) for reference, _ in seen)
    assert same(seen[0][1], before) and not same(seen[1][1], before)
    first, *rest = [line["kl"] for line in read_metrics(tmp_path / "run")[1:]]
    assert abs(first) < 1e-9 and min(rest) > 1e-6


def test_without_a_kl_term_there_is_no_reference(config, word_sets, tmp_path, monkeypatch):
    seen, original = [], arms.policy_gradient
    monkeypatch.setattr(arms, "policy_gradient", lambda *a, **kw: (seen.append(kw["reference"]), original(*a, **kw))[1])
    c = config(grpo={"beta": 0.0, "steps": 1})
    fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run", reward=graded)
    assert seen == [None]


def test_grpo_warms_up_decays_clips_and_validates_as_configured(config, word_sets, tmp_path, monkeypatch, optimizers):
    norms, original = [], arms.update
    monkeypatch.setattr(arms, "update", lambda *a, **kw: (norms.append(kw["max_grad_norm"]), original(*a, **kw))[1])
    settings = {"learning_rate": 0.012, "warmup_steps": 3, "weight_decay": 0.5, "max_grad_norm": 0.25}
    c = config(grpo={**settings, "steps": 5, "eval_every": 2, "num_iterations": 2})
    fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run", reward=graded)
    ((given, rates),) = optimizers
    assert given["weight_decay"] == 0.5
    assert rates == pytest.approx([rate for rate in (0.004, 0.008, 0.012, 0.012, 0.012) for _ in range(2)])
    assert norms == [0.25] * 10
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [-1, 1, 3, 4]


def test_a_line_of_grpo_is_about_its_own_rollouts(config, word_sets, tmp_path, monkeypatch):
    seen, original = [], arms.rollout
    monkeypatch.setattr(arms, "rollout", lambda *a, **kw: (seen.append(original(*a, **kw)), seen[-1])[1])
    c = config(grpo={"steps": 2, "num_problems": 3, "num_generations": 4, "num_iterations": 2, "arm": "temperature"})
    fit_grpo(sharpen(model_from_config(c)), *word_sets, c, out=tmp_path / "run", reward=graded)
    for line, out in zip(read_metrics(tmp_path / "run")[1:], seen, strict=True):
        rewards = out.rewards(graded)
        assert (line["arm"], line["candidates"], line["groups"]) == ("temperature", 3, 3)
        assert line["reward"] == pytest.approx(rewards.mean().item())
        assert line["reward_std"] == pytest.approx(rewards.std(1).mean().item())
        assert line["completions/mean_length"] == pytest.approx(out.token_mask.sum().item() / 12)
        assert line["replay_gap"] < 1e-5  # of the first update: the second has moved


def test_the_supervised_arm_sees_as_many_sequences_all_latent_without_the_decoding_loss(
    config, word_sets, tmp_path, monkeypatch
):
    seen, original = [], arms.curriculum_gradient

    def watched(model, problems, stage, c, *, step):
        seen.append(([p.id for p in problems], stage, c.curriculum.decode_weight, step))
        return original(model, problems, stage, c, step=step)

    monkeypatch.setattr(arms, "curriculum_gradient", watched)
    c = config(grpo={"arm": "supervised", "steps": 2}, curriculum={"decode_weight": 0.5})
    summary = fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    assert [row[1:] for row in seen] == [(2, 0.0, 0), (2, 0.0, 1)]
    assert [len(row[0]) for row in seen] == [12, 12] and summary["rollouts"] == 24
    assert len(set(seen[0][0] + seen[1][0])) == 24  # the whole epoch, each problem once


def test_the_last_iteration_tries_no_more_problems_than_the_budget_has(config, word_sets, tmp_path):
    """3 steps of 3 problems: with up to 5 candidates and equal rewards, 5 and then the last 4; no update at all."""
    c = config(grpo={"steps": 3, "num_problems": 3, "num_generations": 4, "max_candidates": 5, "learning_rate": 1e-2})
    model = model_from_config(c)
    before = weights(model)
    summary = fit_grpo(model, *word_sets, c, out=tmp_path / "run", reward=lambda text, problem: 1.0)
    lines = read_metrics(tmp_path / "run")[1:]
    names = ("rollouts", "candidates", "groups", "loss", "replay_gap", "grad_norm", "frac_reward_zero_std", "reward")
    assert [[line[name] for name in names] for line in lines] == [[20, 5, 0, 0, 0, 0, 1, 1], [36, 4, 0, 0, 0, 0, 1, 1]]
    assert summary["rollouts"] == 36 and ["validation_accuracy" in line for line in lines] == [False, True]
    assert same(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"], before)


def mixed_for(*ids):
    """A reward that differs within the groups of these problems alone."""
    count = itertools.count()
    return lambda text, problem: float(next(count) % 2) if problem.id in ids else 1.0


@pytest.mark.parametrize(
    ("most", "mixed", "tried", "kept"),
    [(0, (1,), 2, [0, 1]), (6, (1, 2, 4), 4, [1, 2]), (6, (0, 2, 3), 4, [0, 2]), (5, (3,), 5, [3]), (6, (), 6, [])],
)
def test_the_first_mixed_groups_in_data_order_are_kept(config, word_sets, most, mixed, tried, kept):
    c = config(grpo={"num_problems": 2, "num_generations": 4, "max_candidates": most}, seed=3)
    order = [word_sets[0][i] for i in batch_indices(24, most or 2, seed=3, step=7)]
    reward = mixed_for(*(order[i].id for i in mixed))
    batch = arms.sample_groups(sharpen(model_from_config(c)), word_sets[0], c, 7, reward)
    assert batch.kept == kept and batch.rewards.shape == batch.lengths.shape == (tried, 4)
    assert [i for i in range(tried) if len(set(batch.rewards[i].tolist())) > 1] == [i for i in mixed if i < tried]
    assert [i for _, places in batch.parts for i in places] == kept
    seeds = rollout_seeds(3, 7, [p.id for p in order], 4).view(-1, 4)
    for out, places in batch.parts:
        assert [p.id for p in out.problems] == [order[i].id for i in places]
        assert torch.equal(out.seeds.view(-1, 4), seeds[places])
        assert torch.equal(out.token_mask.sum(1).view(-1, 4), batch.lengths[places])


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "dapo"])
def test_an_update_divides_by_the_kept_groups_alone(config, word_sets, monkeypatch, loss_type):
    seen, batches = [], []
    sampled = arms.sample_groups
    monkeypatch.setattr(arms, "sample_groups", lambda *a, **kw: (batches.append(sampled(*a, **kw)), batches[-1])[1])
    original = arms.policy_gradient

    def watched(model, out, advantages, config, *, denominator, **settings):
        seen.append((advantages, denominator))
        return original(model, out, advantages, config, denominator=denominator, **settings)

    monkeypatch.setattr(arms, "policy_gradient", watched)
    grpo = {"num_problems": 2, "num_generations": 4, "max_candidates": 6, "loss_type": loss_type}
    c = config(grpo=grpo, max_new_tokens=6)
    model = sharpen(model_from_config(c))
    order = [word_sets[0][i] for i in batch_indices(24, 6, seed=0, step=0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reward = mixed_for(order[1].id, order[2].id)
    arms._iteration(model, None, optimizer, word_sets[0], c, 0, reward, 6)
    (batch,) = batches
    tokens = int(batch.lengths[[1, 2]].sum())
    assert batch.kept == [1, 2] and tokens < int(batch.lengths.sum())
    assert [denominator for _, denominator in seen] == [{"dr_grpo": 8 * 6, "grpo": 8, "dapo": tokens}[loss_type]] * 2
    expected = group_advantages(batch.rewards)[[1, 2]]
    torch.testing.assert_close(torch.stack([a for a, _ in seen]).double(), expected)


# -- curriculum -----------------------------------------------------------------------------------------------------


def test_each_stage_of_the_curriculum_has_its_own_optimizer_and_cosine(config, word_sets, tmp_path, optimizers):
    settings = {"learning_rate": 0.01, "weight_decay": 0.3, "betas": [0.8, 0.9], "final_lr_fraction": 0.2}
    c = config(curriculum={**settings, "warmup_steps": 2, "steps": [4, 3, 5], "stop_accuracy": 2.0})
    fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    assert [given["betas"] for given, _ in optimizers] == [(0.8, 0.9)] * 3
    assert [given["weight_decay"] for given, _ in optimizers] == [0.3] * 3
    for (_, rates), total in zip(optimizers, (4, 3, 5), strict=True):
        assert rates == pytest.approx([0.01 * warmup_cosine(i, total=total, warmup=2, final=0.2) for i in range(total)])


def test_stage_accuracies_are_the_best_of_each_and_only_the_last_stage_is_kept(
    config, word_sets, tmp_path, monkeypatch
):
    accuracies = iter([0.9, 0.8, 0.5, 0.7, 0.6])
    monkeypatch.setattr(curriculum.Run, "accuracy", lambda run: next(accuracies))
    c = config(curriculum={"steps": [2, 2, 6], "eval_every": 2, "stop_accuracy": 1.0})
    summary = fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    assert summary == {"stages": {"0": 0.9, "1": 0.8, "2": 0.7}, "validation_accuracy": 0.7}
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [1, 3, 5, 7, 9]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["progress"]["best_step"] == 7


def test_an_earlier_stage_may_write_its_longest_validation_text(config, word_sets):
    c = config(curriculum={"steps": [2, 2, 2], "c_thought": 3}, max_new_tokens=4)
    model = model_from_config(c)
    for stage in range(3):
        set_stage(model, c, stage, word_sets[1])
        texts = model.tokenizer([stage_text(p, stage, 2) for p in word_sets[1]], add_special_tokens=False)["input_ids"]
        assert model.num_thoughts == 3 * stage
        assert model.max_new_tokens == (4 if stage == 2 else 1 + max(map(len, texts)))


@pytest.mark.parametrize("size", [0, 2])
def test_both_losses_of_the_curriculum_and_their_gradient_by_the_book(config, word_sets, size):
    """Two thoughts a step, the second decoded to the step's result; one problem at a time and summed by hand."""
    settings = {"c_thought": 2, "decode_weight": 0.3, "micro_batch": size, "mask": {"rate": 0.3}}
    c = config(curriculum=settings, seed=4)
    model, batch = model_from_config(c), word_sets[0][:3]
    model.lm.double()
    set_stage(model, c, 2, batch)
    got = curriculum_gradient(model, batch, 2, c, step=5)
    grads = gradients(model)
    answer = decode = 0.0
    count = 0
    for problem in batch:
        seeds = rollout_seeds(4, 5, [problem.id], 1)
        masks = draw_masks(c.curriculum.mask, model, seeds, num_slots=5)
        tokens, real = encode_answers(model.tokenizer, [stage_text(problem, 2, 2)])
        prompt = encode_prompts(model.tokenizer, [problem], "cpu")
        hidden, thoughts = model.teacher_forced(*prompt, tokens, masks=masks)
        logps = torch.log_softmax(model.head(hidden), -1)
        answer -= logps[real].gather(-1, tokens[real][:, None]).sum()
        for z, step in zip(thoughts[0, 1::2], problem.steps, strict=True):
            result = model.tokenizer(step_result(step), add_special_tokens=False)["input_ids"][0]
            decode -= torch.log_softmax(model.head(z), -1)[result]
        count += int(real.sum())
    loss = answer / count + 0.3 * decode / 6  # 3 problems of 2 steps
    loss.backward()
    expected = {"loss": loss.item(), "loss/answer": answer.item() / count, "loss/decode": decode.item() / 6}
    assert got == pytest.approx(expected, rel=1e-9)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-12)


# -- one step -------------------------------------------------------------------------------------------------------


def test_an_update_clips_the_gradient_and_returns_the_norm_before():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data.zero_()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    stats = update(model, torch.optim.SGD(model.parameters(), lr=1.0), {"loss": 2.0}, step=0, max_grad_norm=0.5)
    assert stats == {"loss": 2.0, "grad_norm": pytest.approx(5.0)} and model.weight.grad is None
    assert model.weight.tolist() == [pytest.approx([-0.3, -0.4], rel=1e-5)]


def test_a_number_that_is_not_finite_moves_no_weight():
    model = torch.nn.Linear(2, 1, bias=False)
    before, model.weight.grad = model.weight.clone(), torch.ones(1, 2)
    with pytest.raises(FloatingPointError, match="^loss: got nan at step 7"):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        update(model, optimizer, {"loss": float("nan")}, step=7, max_grad_norm=1.0)
    assert torch.equal(model.weight, before)


def test_the_cosine_by_hand():
    shares = [warmup_cosine(i, total=6, warmup=2, final=0.2) for i in range(8)]
    half = 0.2 + 0.8 * (1 + 0.5**0.5) / 2
    assert shares == pytest.approx([0.5, 1.0, 1.0, half, 0.6, 1.2 - half, 0.2, 0.2])
    assert warmup_cosine(0, total=2, warmup=2, final=0.0) == 0.5 and warmup_cosine(2, total=2, warmup=2, final=0) == 1


# -- the run folder -------------------------------------------------------------------------------------------------


def test_processes_agree_on_what_a_run_is_and_where_it_stands(config, word_sets, tmp_path, monkeypatch):
    """Every process must have the same files, settings and weights, or none begins."""
    seen = []
    monkeypatch.setattr(run.distributed, "check_same", lambda **facts: seen.append(facts))
    c = config(grpo={"steps": 2})
    for resume in (False, True):
        fit_grpo(model_from_config(c), *word_sets, c, out=tmp_path / "run", reward=graded, resume=resume)
    assert [facts.pop("checkpoint") for facts in seen] == [0, 2]
    stored = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["identity"]
    assert seen == [stored, stored] and stored["loop"] == "grpo"


def test_a_step_without_validation_is_no_best_one(config, word_sets, tmp_path):
    c = config()
    model = model_from_config(c)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folder = run.Run(tmp_path / "run", c, model, *word_sets, loop="grpo")
    folder.end_step(optimizer, {"step": 0})
    assert folder.progress.best_step is None and not (tmp_path / "run" / "best").exists()
    folder.end_step(optimizer, {"step": 1, "validation_accuracy": 0.0})
    assert (folder.progress.best_step, folder.progress.best) == (1, 0.0)
    folder.end_step(optimizer, {"step": 2, "validation_accuracy": 0.5}, keep_best=False)
    folder.end_step(optimizer, {"step": 3, "validation_accuracy": 0.0})  # no better
    assert json.loads((tmp_path / "run" / "best" / "validation.json").read_text())["step"] == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: clock["now"] in seconds, as of some time after the machine's start."""
    clock = {"now": 1000.0}
    monkeypatch.setattr(run.time, "monotonic", lambda: clock["now"])
    return clock


def test_a_run_stops_after_its_minutes_and_not_before(config, word_sets, tmp_path, clock):
    c = config()
    model = model_from_config(c)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folder = run.Run(tmp_path / "run", c, model, *word_sets, loop="grpo", max_minutes=2.0)
    clock["now"] += 119
    folder.end_step(optimizer, {"step": 0})
    clock["now"] += 1
    folder.end_step(optimizer, {"step": 1}, last=True)  # nothing is left to stop
    with pytest.raises(run.Stopped, match="^stopped by --max-minutes 2 after step 1, everything is saved in .*/run; "):
        folder.end_step(optimizer, {"step": 1})
    assert [line["seconds"] for line in read_metrics(tmp_path / "run", "timing.jsonl")] == [0, 119, 120, 120]
    endless = run.Run(tmp_path / "endless", c, model, *word_sets, loop="grpo")
    clock["now"] += 1e6
    endless.end_step(optimizer, {"step": 0})


def test_a_checkpoint_is_written_when_the_last_one_is_so_many_minutes_old(config, word_sets, tmp_path, clock):
    c = config()
    model = model_from_config(c)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folder = run.Run(tmp_path / "run", c, model, *word_sets, loop="grpo", checkpoint_minutes=3.0)

    def saved(step):
        folder.end_step(optimizer, {"step": step})
        state = tmp_path / "run" / "state.pt"
        return state.exists() and torch.load(state, weights_only=True)["progress"]["step"]

    for seconds, step in ((179, False), (1, 2), (179, 2), (1, 4), (180, 5)):
        clock["now"] += seconds
        assert saved(folder.progress.step) == step


def test_a_signal_to_any_process_stops_this_one(config, word_sets, tmp_path, monkeypatch):
    c = config()
    model = model_from_config(c)
    folder = run.Run(tmp_path / "run", c, model, *word_sets, loop="grpo")
    monkeypatch.setattr(run.distributed, "gather", lambda job: [job(), "SIGTERM", ""])
    with pytest.raises(run.Stopped, match="^stopped by SIGTERM after step 0"):
        folder.end_step(torch.optim.SGD(model.parameters(), lr=0.1), {"step": 0})
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["progress"]["step"] == 1


def test_parts_of_a_batch_are_of_like_length(config, problems, monkeypatch):
    """The four problems differ in question and text; sorted, they are padded least."""
    seen, original = [], curriculum._summed_losses
    monkeypatch.setattr(
        curriculum, "_summed_losses", lambda model, part, *rest: (seen.append(part), original(model, part, *rest))[1]
    )
    c = config(curriculum={"micro_batch": 2}, backbone={"n_positions": 128})
    model = model_from_config(c)
    set_stage(model, c, 0, problems)
    curriculum_gradient(model, problems, 0, c, step=0)
    assert seen == [[problems[i] for i in places] for places in ((1, 0), (2, 3))]  # of 1, 2, 3 and 4 steps
