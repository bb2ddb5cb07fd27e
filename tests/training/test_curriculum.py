"""curriculum.py: the text of each stage, where the loss falls, and runs that resume bit for bit."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from latentlab.pretrained.loading import load_model, model_from_config
from latentlab.problems import Problem
from latentlab.training import curriculum
from latentlab.training.curriculum import (
    IGNORE,
    curriculum_gradient,
    encode_answers,
    fit_curriculum,
    result_tokens,
    set_stage,
    stage_text,
)
from latentlab.training.preflight import expect_together
from latentlab.training.run import read_metrics

PROBLEM = Problem("p", "Leo has 2 books.", ("<<2+3=5>>", "<<5*2=10>>", "<<10-1=9>>"), "9", "test")


def test_each_stage_replaces_one_more_step():
    assert [stage_text(PROBLEM, stage, 4) for stage in range(4)] == [
        "<<2+3=5>>\n<<5*2=10>>\n<<10-1=9>>\n### 9",
        "<<5*2=10>>\n<<10-1=9>>\n### 9",
        "<<10-1=9>>\n### 9",
        "### 9",
    ]
    assert stage_text(PROBLEM, 2, 2) == "### 9"  # the last stage has no step, however long the chain


def test_answers_are_padded_on_the_right_and_end_in_eos(gpt2):
    tokens, mask = encode_answers(gpt2.tokenizer, ["### 9", "<<2+3=5>>\n### 9"])
    assert mask.sum(1).tolist() == [3, 11]
    for row, text in zip(range(2), ("### 9", "<<2+3=5>>\n### 9"), strict=True):
        real = tokens[row, mask[row]]
        assert real[-1] == gpt2.eos_id and gpt2.tokenizer.decode(real[:-1]).replace(" ", "") == text.replace(" ", "")
        assert (tokens[row, ~mask[row]] == gpt2.eos_id).all()


def test_the_last_thought_of_a_step_is_decoded_to_its_result(gpt2):
    short = Problem("q", "?", ("<<1+1=2>>",), "2", "test")
    targets = result_tokens(gpt2.tokenizer, [PROBLEM, short], thoughts=4, c_thought=2)
    five, ten, two = gpt2.tokenizer.convert_tokens_to_ids(["5", "10", "2"])
    assert targets.tolist() == [[IGNORE, five, IGNORE, ten], [IGNORE, two, IGNORE, IGNORE]]


def test_without_decoding_a_step_may_be_in_words(config):
    """It trains on them; with a weight the pre-flight check names the problem before anything is written."""
    words = [Problem(f"w-{i}", "Leo has 2 books .", ("Leo buys 3 books", "<<2+3=5>>"), "5", "test") for i in range(6)]
    for weight in (0.0, 0.5):
        c = config(curriculum={"steps": [1, 1, 1], "decode_weight": weight}, backbone={"n_positions": 128})
        model = model_from_config(c)
        set_stage(model, c, 1, words)
        if weight:
            with pytest.raises(
                ValueError, match=r"^problem w-0: got step 'Leo buys 3 books', .*curriculum.decode_weight to 0$"
            ):
                expect_together(model, words, c, curriculum=True)
        else:
            expect_together(model, words, c, curriculum=True)
            assert 0 < curriculum_gradient(model, words, 1, c, step=0)["loss"] < 20


def test_only_text_after_end_carries_loss(config, word_sets):
    """The loss by the book: one problem at a time, whole sequences, no cache."""
    c = config(curriculum={"mask": {"scheme": "none"}, "decode_weight": 0.0})
    model, batch = model_from_config(c), word_sets[0][:3]
    for stage in range(3):
        model.num_thoughts = stage
        stats = curriculum_gradient(model, batch, stage, c, step=0)
        total = count = 0
        for problem in batch:
            ids = model.tokenizer(problem.question + "\n<|start-latent|>")["input_ids"]
            inputs = model.embed(torch.tensor([ids]))
            for _ in range(stage):
                z = model.lm.transformer(inputs_embeds=inputs).last_hidden_state[:, -1:]
                inputs = torch.cat([inputs, z], 1)
            text = "\n".join([*problem.steps[stage:], f"### {problem.answer}"])
            target = model.tokenizer(text)["input_ids"] + [model.eos_id]
            inputs = torch.cat([inputs, model.embed(torch.tensor([[model.end_id, *target[:-1]]]))], 1)
            logits = model.lm(inputs_embeds=inputs).logits[0, -len(target) :]
            total += cross_entropy(logits, torch.tensor(target), reduction="sum").item()
            count += len(target)
        assert stats["loss"] == pytest.approx(total / count, abs=1e-5) == stats["loss/answer"]


def test_stage_zero_applies_no_mask_and_later_stages_do(config, word_sets):
    """Two layers: in one, a mask on <start> would change <start> alone, which nobody reads."""
    bare, masked = (
        config(curriculum={"mask": {"scheme": scheme, "rate": 0.5}}, backbone={"n_layer": 2})
        for scheme in ("none", "shared")
    )
    model = model_from_config(bare)
    for stage, equal in ((0, True), (1, False)):
        model.num_thoughts = stage
        losses = [curriculum_gradient(model, word_sets[0][:4], stage, c, step=0)["loss"] for c in (bare, masked)]
        assert (losses[0] == losses[1]) is equal


def test_the_decoding_loss_is_added_with_its_weight(config, word_sets):
    c, without = config(curriculum={"decode_weight": 0.3}), config(curriculum={"decode_weight": 0.0})
    model = model_from_config(c)
    stats = curriculum_gradient(model, word_sets[0][:4], 2, c, step=0)
    plain = curriculum_gradient(model, word_sets[0][:4], 2, without, step=0)
    assert stats["loss"] == pytest.approx(plain["loss"] + 0.3 * stats["loss/decode"])
    bare = [Problem("q", p.question, (), p.answer, "test") for p in word_sets[0][:2]]  # no step to decode
    assert math.isfinite(curriculum_gradient(model, bare, 2, c, step=0)["loss"])


@pytest.mark.parametrize("scope", ["latent", "all"])
def test_training_texts_longer_than_the_validation_ones_have_slots(config, scope, monkeypatch):
    """One of <start>, one for the thought and, in scope "all", one for each answer token."""
    draw = curriculum.draw_masks

    def watched(spec, model, seeds, num_slots):
        assert num_slots == 2 + (scope == "all") * len(
            encode_answers(model.tokenizer, [stage_text(PROBLEM, 1, 2)])[0][0]
        )
        return draw(spec, model, seeds, num_slots=num_slots)

    monkeypatch.setattr(curriculum, "draw_masks", watched)
    c = config(curriculum={"mask": {"scheme": "per_step", "rate": 0.1, "scope": scope}})
    model = model_from_config(c)
    short = Problem("s", "Leo has 2 books.", ("<<2+3=5>>",), "5", "test")
    set_stage(model, c, 1, [short])
    assert math.isfinite(curriculum_gradient(model, [PROBLEM], 1, c, step=0)["loss"])


def test_the_controls_differ_only_in_what_is_fed_back(config, word_sets, tmp_path):
    settings = {}
    for control in ("coconut", "pause", "direct"):
        c = config(curriculum={"control": control})
        model = model_from_config(c)
        fit_curriculum(model, *word_sets, c, out=tmp_path / control)
        settings[control] = (model.feedback, model.num_thoughts)
        stored = json.loads((tmp_path / control / "best" / "latentlab.json").read_text())
        assert (stored["feedback"], stored["num_thoughts"]) == settings[control]
    assert settings == {"coconut": ("thought", 2), "pause": ("pause", 2), "direct": ("none", 0)}
    first = [read_metrics(tmp_path / control)[0]["loss"] for control in settings]
    assert first[0] == first[1] == first[2]  # stage 0 has no thought: the same loss on the same batch


def test_a_run_writes_its_steps_and_a_checkpoint_that_transformers_loads(config, word_sets, tmp_path):
    c = config()
    model = model_from_config(c)
    summary = fit_curriculum(model, *word_sets, c, out=tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["stage"] for line in lines] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [2, 4, 6, 8]
    assert set(summary["stages"]) == {"0", "1", "2"}
    assert summary["validation_accuracy"] == max(line.get("validation_accuracy", 0) for line in lines[5:])
    assert lines[-1]["loss"] < lines[5]["loss"] or lines[4]["loss"] < lines[0]["loss"]
    best = load_model(str(tmp_path / "run" / "best"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best")
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(best.lm(ids).logits, plain(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "best").get_vocab() == model.tokenizer.get_vocab()


def test_the_last_stage_stops_at_its_accuracy(config, word_sets, tmp_path):
    c = config(curriculum={"stop_accuracy": 0.0})
    summary = fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    again = fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run", resume=True)
    assert again == summary
    assert [line["step"] for line in read_metrics(tmp_path / "run")][-1] == 6  # its first validation


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch, module, name, call):
    """Let the `call`-th call of a function raise, as a kill would end the run there."""
    original, calls = getattr(module, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Interrupted
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("call", [1, 3, 4, 6, 9])  # within stage 0, at the start of stage 1, within the last
def test_resume_equals_an_uninterrupted_run_bit_for_bit(config, word_sets, tmp_path, monkeypatch, call):
    c = config()
    whole = model_from_config(c)
    expected = fit_curriculum(whole, *word_sets, c, out=tmp_path / "whole")
    with monkeypatch.context() as killed, pytest.raises(Interrupted):
        interrupt_at(killed, curriculum, "curriculum_gradient", call)
        fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    resumed = model_from_config(c)
    assert fit_curriculum(resumed, *word_sets, c, out=tmp_path / "run", resume=True) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
    best = [(tmp_path / name / "best" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert best[0] == best[1]
    model = model_from_config(c)
    again = fit_curriculum(model, *word_sets, c, out=tmp_path / "run", resume=True)  # nothing left to do
    assert again == expected


def test_a_nan_stops_the_run_and_keeps_the_last_checkpoint(config, word_sets, tmp_path, monkeypatch):
    c = config()
    original, calls = curriculum.curriculum_gradient, [0]

    def poisoned(*args, **kwargs):
        calls[0] += 1
        stats = original(*args, **kwargs)
        return {**stats, "loss": math.nan} if calls[0] == 5 else stats

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="at step 4, expected a finite number"):
        patch.setattr(curriculum, "curriculum_gradient", poisoned)
        fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 3 and all(torch.isfinite(w).all() for w in state["model"].values())
    fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run", resume=True)


def test_wrong_use_is_one_line_before_anything_is_written(config, word_sets, tmp_path):
    c = config()
    for train, validation in (([], word_sets[1]), (word_sets[0], [])):
        with pytest.raises(ValueError, match="^data: got .* expected both"):
            fit_curriculum(model_from_config(c), train, validation, c, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run")
    with pytest.raises(FileExistsError, match="^run folder"):
        fit_curriculum(model_from_config(c), *word_sets, c, out=tmp_path / "run")


def test_a_mask_is_drawn_per_problem_and_step(config, word_sets, monkeypatch):
    seen = []
    draw = curriculum.draw_masks

    def watched(spec, model, seeds, **settings):
        seen.append(seeds)
        return draw(spec, model, seeds, **settings)

    monkeypatch.setattr(curriculum, "draw_masks", watched)
    c = config(curriculum={"mask": {"rate": 0.2}})
    model = model_from_config(c)
    for step in (0, 1):
        curriculum_gradient(model, word_sets[0][:3], 1, c, step=step)
    assert len(set(torch.cat(seen).tolist())) == 6


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("scheme", ["shared", "per_step"])
def test_parts_of_like_length_give_the_loss_of_the_whole_batch(config, word_sets, stage, scheme, monkeypatch):
    train = sorted(word_sets[0][:7], key=lambda p: p.id, reverse=True)
    values, parts, encode = {}, [], curriculum.encode_prompts
    monkeypatch.setattr(
        curriculum, "encode_prompts", lambda t, part, device: (parts.extend(part), encode(t, part, device))[1]
    )
    for size in (0, 1, 3):
        parts.clear()
        c = config(curriculum={"micro_batch": size, "decode_weight": 0.5, "mask": {"scheme": scheme, "rate": 0.3}})
        model = model_from_config(c)
        model.lm.double()
        set_stage(model, c, stage, train)
        stats = curriculum_gradient(model, train, stage, c, step=3)
        values[size] = stats, torch.cat([p.grad.flatten() for p in model.parameters()])
    lengths = [len(p.question) + len(stage_text(p, stage, c.latent_stages)) for p in parts]
    assert lengths == sorted(lengths) and len(set(lengths)) > 3
    for size in (1, 3):
        assert values[size][0] == pytest.approx(values[0][0], rel=1e-12)
        assert torch.allclose(values[size][1], values[0][1], rtol=1e-9, atol=1e-12)
