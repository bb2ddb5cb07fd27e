"""Every number of a run, typed and checked before any compute. The numbers live in presets/*.yaml, nowhere else.

load_preset("tiny") -> Config          an unknown preset or key, or a value of the wrong type, is one clear line
arm_settings(config.grpo, "shared")    the mask and the temperature that an arm's name stands for
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from latentlab.masks import MaskSpec

PRESETS = Path(__file__).parent / "presets"
ARMS = ("none", "temperature", "shared", "per_step", "shared_greedy", "supervised")
LARGEST = 10_000_000  # of any whole number but a seed
CONTROLS = {"coconut": "thought", "pause": "pause", "direct": "none"}  # curriculum variant -> what is fed back


@dataclass(frozen=True)
class DataConfig:
    name: str = "word_problems"  # word_problems | gsm8k | gsm8k_aug
    train_size: int = 1000  # problems; 0 takes all
    validation_size: int = 200  # problems
    test_size: int = 200  # problems
    steps: int = 4  # arithmetic steps of a word problem
    copies: int = 0  # number-perturbed copies per training problem at most, see perturb.py; GSM8K data sets only
    seed: int = 0


@dataclass(frozen=True)
class BackboneConfig:
    name_or_path: str = (
        "scratch"  # "scratch": a GPT-2 of the shape below; "smollm2": from the wheel; else folder or Hub id
    )
    n_layer: int = 1
    n_embd: int = 128
    n_head: int = 4
    n_positions: int = 128


@dataclass(frozen=True)
class CurriculumConfig:
    control: str = "coconut"  # coconut | pause (same steps, no thought fed back) | direct (no latent step)
    steps: tuple[int, ...] = (10, 10)  # updates of stage 0 (explicit steps), 1, ..., the last (no explicit step)
    c_thought: int = 1  # latent thoughts per replaced step
    batch_size: int = 128  # problems per update
    micro_batch: int = 0  # problems of like length run together, which saves padding; 0 runs the batch at once
    learning_rate: float = 3.0e-3
    betas: tuple[float, ...] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup_steps: int = 30  # updates, at the start of each stage
    final_lr_fraction: float = 0.1  # where the cosine of a stage ends, as a share of learning_rate
    max_grad_norm: float = 1.0
    decode_weight: float = 0.0  # weight of decoding each thought to its step's result (SIM-CoT); 0 is plain Coconut
    mask: MaskSpec = field(default_factory=MaskSpec)  # worn during latent stages
    eval_every: int = 25  # updates between validations in the last stage
    stop_accuracy: float = 1.0  # the last stage stops at this validation accuracy


@dataclass(frozen=True)
class GRPOConfig:
    arm: str = "shared"  # none | temperature | shared | per_step | shared_greedy | supervised
    steps: int = 10  # iterations: a batch of rollouts, then num_iterations updates; in all steps * B * K rollouts
    num_problems: int = 32  # B, problems per iteration
    num_generations: int = 16  # K, rollouts per problem
    max_candidates: int = 0  # dynamic sampling: try up to this many problems to fill B with mixed groups; 0: take any B
    micro_batch: int = 0  # problems scored at once in the update; 0 takes all
    memory_gib: float = 0.0  # GiB that a backward pass may hold beside weights and optimizer; 0: no limit. Whole groups
    num_iterations: int = 1  # mu, updates per batch of rollouts
    learning_rate: float = 3.0e-5
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0  # of sampled answers; greedy arms take 0
    mask: MaskSpec = field(default_factory=MaskSpec)  # rate, sites and scope of the masked arms
    baseline: str = "mean"  # mean | leave_one_out | none
    scale_rewards: str = "none"  # none | std, TRL's "group"
    loss_type: str = "dr_grpo"  # dr_grpo | grpo | bnpo | dapo
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0  # weight of the k3 KL to the initial model; 0 needs no reference model
    eval_every: int = 50  # iterations between validations


@dataclass(frozen=True)
class EvaluateConfig:
    batch_size: int = 64  # problems at once
    num_generations: int = 8  # rollouts per problem for pass@k and the majority


@dataclass(frozen=True)
class SweepConfig:
    seeds: tuple[int, ...] = (0,)  # curriculum seeds
    arms: tuple[str, ...] = ARMS
    controls: tuple[str, ...] = ("pause", "direct")
    learning_rates: tuple[float, ...] = (3.0e-5,)  # tried on the validation set with the first seed's base
    rates: tuple[float, ...] = (0.1,)  # mask rates tried likewise
    temperatures: tuple[float, ...] = (1.0,)  # tried likewise, arm `temperature`
    tune_steps: int = 10  # iterations of each trial
    workers: int = 2  # one-thread processes side by side


@dataclass(frozen=True)
class Config:
    preset: str = "smoke"
    seed: int = 0
    max_new_tokens: int = 4  # longest answer, eos included
    precision: str = "float32"  # of matrix products: float32 | bfloat16 (autocast; weights and log-probs stay float32)
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    @property
    def latent_stages(self) -> int:
        return len(self.curriculum.steps) - 1

    @property
    def num_thoughts(self) -> int:
        return self.latent_stages * self.curriculum.c_thought


def check_arms(sweep: SweepConfig) -> None:
    """What a table of arms will need: ValueError unless the main contrast is in it and nothing is there twice."""
    for arm in ("shared", "temperature"):
        if arm not in sweep.arms:
            raise ValueError(
                f"sweep.arms: got no {arm}, expected shared and temperature, whose difference is reported; add it"
            )
    for name in ("seeds", "arms", "controls"):
        values = getattr(sweep, name)
        if len(set(values)) < len(values):
            raise ValueError(
                f"sweep.{name}: got {values}, expected different ones: each is a run folder; drop the repeated"
            )


def load_preset(name: str) -> Config:
    """The preset `name` as a checked Config. Raises ValueError with one line for a bad name, key, type or value."""
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(names)}")
    return from_dict({"preset": name, **read_yaml(PRESETS / f"{name}.yaml")})


class _OnceLoader(yaml.SafeLoader):
    """A key given twice is refused: plain YAML keeps the last one and says nothing."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", node.start_mark)
        return mapping


def read_yaml(path: Path) -> dict:
    """The keys and values of a YAML file. Raises ValueError with one line for anything else."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)  # a SafeLoader: data only, no objects
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:  # ValueError: a date that is none
        raise ValueError(f"{path.name}: no readable YAML: {' '.join(str(error).split())[:300]}; correct it") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path.name}: got {str(values)[:80]!r}, expected `key: value` lines; correct or restore it")
    return values


def from_dict(values: dict) -> Config:
    """A checked Config from plain nested dicts, as read from YAML or JSON."""
    config = _typed(Config, values, "config")
    check(config)
    return config


def to_dict(config: Config) -> dict:
    """Plain nested dicts and lists, as written to JSON."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


def flat(values: dict, where: str = "") -> dict:
    """Nested dicts as one, {"grpo.steps": 10}."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def changed_words(values: dict, *, but: tuple[str, ...] = ()) -> list[str]:
    """What a config, as a dict, changes in its preset, as command-line words; fields that start with `but`: none."""
    base, words = flat(to_dict(load_preset(values["preset"]))), []
    for key, value in flat(values).items():
        if value != base.get(key) and not key.startswith(but):
            words += [f"--{key.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def arm_settings(grpo: GRPOConfig, arm: str) -> tuple[MaskSpec | None, float]:
    """(mask, temperature) of an arm; `supervised` samples nothing and wears the curriculum's mask."""
    masked = {"shared": "shared", "shared_greedy": "shared", "per_step": "per_step"}
    mask = dataclasses.replace(grpo.mask, scheme=masked[arm]) if arm in masked else None
    greedy = arm in ("none", "shared_greedy")
    return mask, 0.0 if greedy else grpo.temperature


def check(config: Config) -> None:
    """Value checks that types cannot make: one ValueError line each."""
    c, g, s = config.curriculum, config.grpo, config.sweep
    _among("precision", config.precision, ("float32", "bfloat16"))
    _among("data.name", config.data.name, ("word_problems", "gsm8k", "gsm8k_aug"))
    if config.data.copies and config.data.name == "word_problems":
        raise ValueError(
            f"data.copies: got {config.data.copies} with word_problems, expected 0; copies need gsm8k or gsm8k_aug"
        )
    _among("curriculum.control", c.control, tuple(CONTROLS))
    for arm in (g.arm, *s.arms):
        _among("arm", arm, ARMS)
    _among("grpo.baseline", g.baseline, ("mean", "leave_one_out", "none"))
    _among("grpo.scale_rewards", g.scale_rewards, ("none", "std"))
    _among("grpo.loss_type", g.loss_type, ("dr_grpo", "grpo", "bnpo", "dapo"))
    if g.baseline == "none" and (g.scale_rewards != "none" or g.max_candidates):
        raise ValueError(
            "grpo.baseline: got none with scale_rewards or max_candidates, expected a baseline; without one groups of "
            "equal rewards teach, and those two would divide them by 0 or drop them"
        )
    for control in s.controls:
        _among("sweep.controls", control, ("pause", "direct"))  # coconut is the baseline of every sweep
    _at_least("grpo.num_generations", g.num_generations, 2, "a group needs two rollouts to compare")
    if g.max_candidates:
        _at_least(
            "grpo.max_candidates", g.max_candidates, g.num_problems, "as many as num_problems, or 0 to take any group"
        )
    _at_least("curriculum.steps", len(c.steps), 2, "stage 0 and at least one latent stage")
    _at_least("curriculum.betas", len(c.betas), 2)
    for text, (holds, names) in _RANGES.items():
        for name in names:
            value = _field(config, name)
            for item in value if isinstance(value, tuple) else (value,):
                if item is not None and not holds(item):
                    raise ValueError(f"{name}: got {item}, expected {text}")
    _check_sizes(config)
    for name in ("seeds", "learning_rates", "rates", "temperatures"):
        _at_least(f"sweep.{name}", len(getattr(s, name)), 1)
    if config.backbone.n_embd % config.backbone.n_head:
        raise ValueError(
            f"backbone.n_head: got {config.backbone.n_head}, expected a divisor of n_embd={config.backbone.n_embd}"
        )


def _check_sizes(config: Config, where: str = "") -> None:
    """Numbers that no machine can serve: refused here, not after hours or out of memory."""
    for field_ in dataclasses.fields(config):
        name, value = where + field_.name, getattr(config, field_.name)
        if dataclasses.is_dataclass(value):
            _check_sizes(value, f"{name}.")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{name}: got {item}, expected a finite number")
            if isinstance(item, int) and field_.name in ("seed", "seeds") and not 0 <= item < 2**31:
                raise ValueError(f"{name}: got {item}, expected a number from 0 to {2**31 - 1}")
            if isinstance(item, int) and field_.name not in ("seed", "seeds") and item > LARGEST:
                raise ValueError(f"{name}: got {item}, expected at most {LARGEST}")
            if isinstance(item, str) and (not item.strip() or "\0" in item):
                raise ValueError(f"{name}: got {item!r}, expected a name")
    if isinstance(config, GRPOConfig) and config.num_problems * config.num_generations > LARGEST:
        rows = config.num_problems * config.num_generations
        raise ValueError(f"grpo.num_problems: got {rows} rollouts in an iteration, expected at most {LARGEST}")


# What each number, or each item of a list, must be; a NaN fails all of them.
_RANGES = {
    "at least 1": (lambda x: x >= 1, (
        "max_new_tokens", "data.validation_size", "data.test_size", "data.steps", "backbone.n_layer", "backbone.n_embd",
        "backbone.n_head", "backbone.n_positions", "curriculum.steps", "curriculum.c_thought", "curriculum.batch_size",
        "curriculum.eval_every", "grpo.steps", "grpo.num_problems", "grpo.num_iterations", "grpo.eval_every",
        "evaluate.batch_size", "evaluate.num_generations", "sweep.tune_steps", "sweep.workers",
    )),
    "at least 0": (lambda x: x >= 0, (
        "data.train_size", "data.copies", "grpo.max_candidates",
        "curriculum.micro_batch", "curriculum.warmup_steps", "curriculum.weight_decay", "curriculum.decode_weight",
        "grpo.micro_batch", "grpo.memory_gib", "grpo.warmup_steps", "grpo.weight_decay", "grpo.epsilon",
        "grpo.epsilon_high", "grpo.beta",
    )),
    "a number above 0": (lambda x: x > 0, ("curriculum.max_grad_norm", "grpo.max_grad_norm")),
    "a number above 0; greedy answers are arms of their own": (
        lambda x: x > 0, ("grpo.temperature", "sweep.temperatures")),
    "a number between 0 and 1, such as 3.0e-5": (
        lambda x: 0 < x < 1, ("curriculum.learning_rate", "grpo.learning_rate", "sweep.learning_rates"),
    ),
    "a number in [0, 1)": (lambda x: 0 <= x < 1, ("curriculum.betas", "sweep.rates")),
    "a number in [0, 1]": (lambda x: 0 <= x <= 1, ("curriculum.final_lr_fraction",)),
}  # fmt: skip


def _field(config: Config, name: str):
    """The value of a dotted name, as in "grpo.steps"."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _among(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")


def _at_least(name: str, value: int, low: int, why: str = "") -> None:
    if value < low:
        raise ValueError(f"{name}: got {value}, expected at least {low}" + (f"; {why}" if why else ""))


def _typed(kind, value, where: str):
    """`value` as `kind`, strictly: no unknown keys, no guessing of types."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: got {value!r}, expected keys and values")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints), key=str)
        if unknown:
            raise ValueError(f"{where}: got the unknown key {unknown[0]!r}, expected some of {', '.join(hints)}")
        return kind(**{key: _typed(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    if isinstance(kind, types.UnionType):
        return None if value is None else _typed(typing.get_args(kind)[0], value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: got {value!r}, expected a list")
        return tuple(_typed(typing.get_args(kind)[0], item, where) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and kind is not bool or not isinstance(value, kind):
        hint = "; YAML reads 1e-4 as text, write 1.0e-4" if kind is float and isinstance(value, str) else ""
        raise ValueError(f"{where}: got {value!r}, expected {kind.__name__}{hint}")
    return value
