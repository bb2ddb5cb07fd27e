"""preflight.py: the exact number of positions, and of unknown words, from which on a run is refused."""

import pytest

from latentlab.pretrained.loading import model_from_config
from latentlab.problems import Problem
from latentlab.training import preflight
from latentlab.training.preflight import expect_together

LONG = Problem("long", "Leo has 2 books. He finds 4 more books.", ("<<2+4=6>>",), "6", "test")
CHAIN = Problem("chain", "Leo has 2 books.", ("<<2+3=5>>", "<<5*2=10>>", "<<10-1=9>>"), "9", "test")


def words(*names):
    return [Problem("p", " ".join(names), (), "1", "test")]


def length(model, text):
    return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def limit(c, **options):
    """The number of positions that `expect_together` asks for; one less is refused."""
    model = model_from_config(c)
    for model.lm.config.max_position_embeddings in range(200, 0, -1):
        try:
            expect_together(model, [CHAIN, LONG], c, **options)
        except ValueError as error:
            need = model.lm.config.max_position_embeddings + 1
            assert str(error).startswith(f"length: got {need} positions")
            return need
    raise AssertionError("no limit")


def test_grpo_needs_the_longest_question_all_thoughts_and_the_longest_answer(config):
    c = config(curriculum={"steps": [1, 1, 1], "c_thought": 3}, max_new_tokens=7)
    model = model_from_config(c)
    assert limit(c) == length(model, LONG.question) + 2 + 6 + 7  # and a line break, <start>


@pytest.mark.parametrize(("control", "thoughts"), [("coconut", 40), ("pause", 40), ("direct", 0)])
def test_the_curriculum_needs_its_longest_text_or_its_most_thoughts(config, control, thoughts):
    c = config(curriculum={"steps": [1, 1, 1], "c_thought": 1, "control": control})
    model = model_from_config(c)
    prompt = length(model, LONG.question) + 2
    texts = length(model, "\n".join([*CHAIN.steps, "### 9"])) + 1
    assert limit(c, curriculum=True) == prompt + texts  # stage 0
    many = config(curriculum={"steps": [1, 1, 1], "c_thought": 20, "control": control})
    assert limit(many, curriculum=True) == prompt + max(texts, thoughts + 3)  # the last stage: ### 9 and eos


def test_of_many_texts_the_longest_are_examined_and_all_that_may_hold_a_control_token(config, monkeypatch):
    monkeypatch.setattr(preflight, "LONGEST", 1)
    c = config()
    model = model_from_config(c)
    expect_together(model, [LONG, *words("zebra"), *words("yak", "emu")], c)  # short unknown words are not looked up
    for question in ("a <|latent|> b", "<|end-latent|>"):
        with pytest.raises(ValueError, match=r"^text: got the control token <\|"):
            expect_together(model, [LONG, *words(question)], c)


def test_a_model_of_other_text_is_one_that_knows_less_than_half_the_words(config):
    c = config()
    model = model_from_config(c)
    expect_together(model, words("zebra", "yak"), c)  # two of four tokens: a line break and <start> are known
    with pytest.raises(ValueError, match="^tokenizer: got 60% unknown words in the questions"):
        expect_together(model, words("zebra", "yak", "emu"), c)
    model.eos_id = model.tokenizer.unk_token_id  # one token for both, as in GPT-2: its count says nothing
    expect_together(model, words("zebra", "yak", "emu"), c)


def test_steps_to_be_decoded_need_a_result(config):
    odd = [Problem("p", "Leo has 2 books.", ("He counts.",), "2", "test")]
    c = config(curriculum={"decode_weight": 0.1})
    model = model_from_config(c)
    expect_together(model, odd, c)  # GRPO decodes nothing
    expect_together(model, odd, config(curriculum={"decode_weight": 0.0}), curriculum=True)
    with pytest.raises(ValueError, match="got step 'He counts.', expected"):
        expect_together(model, odd, c, curriculum=True)


def test_the_mask_of_the_loop_that_runs_must_find_its_sites(config, monkeypatch):
    c = config(curriculum={"mask": {"sites": ["embedding"]}}, grpo={"mask": {"sites": ["mlp"]}})
    model, seen = model_from_config(c), []
    monkeypatch.setattr(type(model), "num_sites", lambda self, sites: seen.append(sites))
    expect_together(model, words("Leo"), c)
    expect_together(model, words("Leo"), c, curriculum=True)
    assert seen == [("mlp",), ("embedding",)]
