"""config.py: presets load, arms mean what they say, and every wrong value is one clear line."""

import dataclasses
import json
import tomllib

import pytest

from latentlab.config import CONTROLS, PRESETS, Config, GRPOConfig, flat, from_dict, load_preset, to_dict
from latentlab.model import FEEDBACKS

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_presets_load_and_survive_json(name):
    config = load_preset(name)
    assert config.preset == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)


def read(name):
    return tomllib.loads((PRESETS / f"{name}.toml").read_text())


def test_smoke_is_tiny_but_for_what_its_file_says():
    tiny, smoke, said = (
        flat(values) for values in (to_dict(load_preset("tiny")), to_dict(load_preset("smoke")), read("smoke"))
    )
    assert said.pop("inherits") == "tiny"
    assert smoke == {**tiny, **said, "preset": "smoke"}


def test_every_number_of_a_preset_reaches_the_config():
    def holds(config, values):
        for key, value in values.items():
            got = config[key]
            holds(got, value) if isinstance(value, dict) else pytest.approx(value) == got or pytest.fail(
                f"{key}: {got}"
            )

    for name in NAMES:
        holds(to_dict(load_preset(name)), {k: v for k, v in read(name).items() if k != "inherits"})


def test_thoughts_follow_from_the_stages():
    config = from_dict({"curriculum": {"steps": [1, 1, 1, 1], "c_thought": 2}})
    assert (config.latent_stages, config.num_thoughts) == (3, 6)


def test_every_control_is_a_feedback_of_the_model():
    assert set(CONTROLS.values()) == set(FEEDBACKS)


def refuses(values, message):
    with pytest.raises(ValueError, match=message) as error:
        from_dict(values)
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_an_unknown_preset_names_the_known_ones():
    for name in ("huge", "../tiny", ""):
        with pytest.raises(ValueError, match="^preset: got .*, expected one of .*tiny"):
            load_preset(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grpo": {"baseline": "none", "scale_rewards": "group"}}, "^grpo.baseline: got none with scale_rewards"),
        ({"grpo": {"baseline": "none", "scale_rewards": "batch"}}, "^grpo.baseline: got none with scale_rewards"),
        ({"grpo": {"scale_rewards": "std"}}, "^grpo.scale_rewards: got 'std', expected .*'group'.*TRL's group$"),
        ({"grpo": {"loss_type": "bnpo"}}, "^grpo.loss_type: got 'bnpo', .*; use dapo"),
        ({"grpo": {"loss_type": "cispo"}}, "^grpo.epsilon_high: got None with loss_type cispo, expected .* use 5.0"),
        ({"grpo": {"baseline": "none", "max_candidates": 64}}, "^grpo.baseline: got none with scale_rewards or max_"),
        ({"sead": 1}, "^sead: got 1, expected no such field; correct its name$"),
        ({"grpo": {"learningrate": 1e-4}}, r"^grpo\.learningrate: got 0.0001, expected no such field"),
        ({"grpo": {"mask": {"p": 0.1}}}, r"^grpo\.mask\.p: got 0.1, expected no such field"),
        ({"grpo": {"learning_rate": "1e-4"}}, r"^grpo\.learning_rate: got '1e-4', expected a valid number$"),
        ({"seed": "0"}, "^seed: got '0', expected a valid integer$"),
        ({"seed": True}, "^seed: got True, expected a valid integer$"),
        ({"seed": 1.0}, "^seed: got 1.0, expected a valid integer$"),
        ({"grpo": {"steps": None}}, r"^grpo\.steps: got None, expected a valid integer$"),
        ({"grpo": {"temperature": True}}, r"^grpo\.temperature: got True, expected a valid number$"),
        ({"grpo": 3}, "^grpo: got 3, expected keys and values$"),
        ({"grpo": None}, "^grpo: got None, expected keys and values$"),
        ({"curriculum": {"steps": 4}}, r"^curriculum\.steps: got 4, expected a list$"),
        ({"curriculum": {"steps": ["4"]}}, r"^curriculum\.steps\.0: got '4', expected a valid integer$"),
        ({"curriculum": {"betas": [0.9, 0.98, 0.99]}}, r"^curriculum\.betas: got .*, expected at most 2 items$"),
        ({"grpo": {"mask": {"sites": "mlp"}}}, r"^grpo\.mask\.sites: got 'mlp', expected a list$"),
        ({"grpo": {"epsilon_high": "0.2"}}, r"^grpo\.epsilon_high: got '0.2', expected a valid number$"),
    ],
)
def test_unknown_keys_and_wrong_types(values, message):
    refuses(values, message)


NAN = float("nan")


@pytest.mark.parametrize(
    ("section", "key", "bad"),
    [
        ("grpo", "num_generations", (1, 0, -2)),
        ("grpo", "arm", ("dropout", "")),
        ("grpo", "temperature", (0.0, -1.0, NAN)),
        ("grpo", "loss_type", ("ppo", "sapo")),
        ("grpo", "importance_sampling_level", ("batch", "")),
        ("grpo", "baseline", ("median",)),
        ("grpo", "scale_rewards", ("batches", "")),
        ("grpo", "learning_rate", (0.0, -1e-4, 30.0, NAN)),
        ("grpo", "steps", (0,)),
        ("grpo", "num_problems", (0,)),
        ("grpo", "num_iterations", (0,)),
        ("grpo", "micro_batch", (-1,)),
        ("grpo", "epsilon", (-0.1, 0.0, NAN)),
        ("grpo", "epsilon_high", (-0.1, 0.0)),
        ("grpo", "beta", (-0.1, NAN)),
        ("grpo", "max_grad_norm", (0.0, NAN)),
        ("grpo", "weight_decay", (-0.1, NAN)),
        ("grpo", "warmup_steps", (-1,)),
        ("grpo", "eval_every", (0,)),
        ("curriculum", "control", ("none",)),
        ("curriculum", "steps", ([], [3], [3, 0], [-1, 3])),
        ("curriculum", "c_thought", (0,)),
        ("curriculum", "batch_size", (0,)),
        ("curriculum", "learning_rate", (0.0, NAN)),
        ("curriculum", "betas", ([0.9], [0.9, 1.0], [-0.1, 0.9])),
        ("curriculum", "weight_decay", (-1.0,)),
        ("curriculum", "warmup_steps", (-1,)),
        ("curriculum", "final_lr_fraction", (-0.1, 1.1)),
        ("curriculum", "max_grad_norm", (0.0,)),
        ("curriculum", "decode_weight", (-0.1, NAN)),
        ("curriculum", "eval_every", (0,)),
        ("data", "name", ("gsm",)),
        ("data", "train_size", (-1,)),
        ("data", "validation_size", (0,)),
        ("data", "test_size", (0,)),
        ("data", "steps", (0,)),
        ("evaluate", "batch_size", (0,)),
        ("evaluate", "num_generations", (0,)),
        ("backbone", "n_head", (3, 0)),
        ("backbone", "n_layer", (0,)),
        ("sweep", "seeds", ([],)),
        ("sweep", "arms", (["dropout"],)),
        ("sweep", "controls", (["stop"],)),
        ("sweep", "learning_rates", ([0.0], [])),
        ("sweep", "rates", ([1.0], [-0.1], [])),
        ("sweep", "temperatures", ([0.0], [])),
        ("sweep", "workers", (0,)),
        ("sweep", "tune_steps", (0,)),
    ],
)
def test_values_out_of_range(section, key, bad):
    for value in bad:
        refuses({section: {key: value}}, rf"^{section}\.{key}(\.\d+)?: got ")


@pytest.mark.parametrize("rate", [1.0, -0.1, 2.0, NAN])
def test_a_mask_rate_out_of_range(rate):
    for section in ("grpo", "curriculum"):
        refuses({section: {"mask": {"rate": rate}}}, rf"^(mask rate|{section}\.mask\.rate): got")


def test_a_constructor_and_replace_check_their_values():
    grpo = GRPOConfig()
    for make in (lambda: GRPOConfig(steps=0), lambda: dataclasses.replace(grpo, steps=0)):
        with pytest.raises(ValueError, match=r"^grpo\.steps: got 0, expected at least 1$"):
            make()
    with pytest.raises(ValueError, match="^seed: got 'x', expected a valid integer$"):
        dataclasses.replace(Config(), seed="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        grpo.steps = 3
    assert dataclasses.replace(grpo, steps=3).steps == 3


def test_whole_numbers_are_fine_where_floats_are_asked():
    config = from_dict({"grpo": {"temperature": 1, "epsilon_high": 1}})
    assert isinstance(config.grpo.temperature, float) and isinstance(config.grpo.epsilon_high, float)
    assert from_dict({}) == Config()
