"""Settings of a run: typed, frozen, validated on construction. The values are in presets/*.toml.

load_preset("tiny") -> Config          an unknown preset or field, or an invalid value, is a one-line ValueError
arm_settings(config.grpo, "shared")    the mask and the sampling temperature of a named arm
"""

import dataclasses
import json
import re
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from latentlab.advantage import STD
from latentlab.loss import BNPO, CISPO_NEEDS
from latentlab.masks import MaskSpec

PRESETS = Path(__file__).parent / "presets"
CONTROLS = {"coconut": "thought", "pause": "pause", "direct": "none"}  # curriculum variant -> feedback of the model
LARGEST = 10_000_000  # upper limit of every integer but a seed

Arm = Literal["none", "temperature", "shared", "per_step", "shared_greedy", "antithetic", "gaussian", "supervised"]
ARMS: tuple[Arm, ...] = typing.get_args(Arm)
T = typing.TypeVar("T")
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Weight = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
LearningRate = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Some = Annotated[tuple[T, ...], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]


@typing.dataclass_transform(frozen_default=True)
class Section:
    """Subclasses are frozen, strict pydantic dataclasses; a bad value is a one-line ValueError."""

    def __init_subclass__(cls, name: str = "") -> None:
        settings = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
        construct = pydantic.dataclasses.dataclass(cls, frozen=True, config=settings).__init__

        def __init__(self, *args, **kwargs):
            try:
                construct(self, *args, **kwargs)
            except pydantic.ValidationError as error:
                raise ValueError(_one_line(error, name)) from None

        cls.__init__ = __init__  # type: ignore[method-assign]  # wraps the one that pydantic made


def _one_line(error: pydantic.ValidationError, section: str = "") -> str:
    """The first validation error as `section.field: got ..., expected ...`."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # raised by a __post_init__, with a message of its own
        return str(first["ctx"]["error"])
    field = ".".join(str(part) for part in (section, *first["loc"]) if part != "")
    expected = first["msg"].removeprefix("Input should be ")
    for pattern, replacement in _PHRASES.items():
        expected = re.sub(pattern, replacement, expected)
    note = {"std": f"; {STD}", "bnpo": f"; {BNPO}"}.get(str(first["input"]), "")
    return f"{field or 'config'}: got {first['input']!r:.80}, expected {expected}{note}"


_PHRASES = {  # pydantic's, as part of a sentence
    r"^Unexpected keyword argument": "no such field; correct its name",
    r"^Field required": "one more item",
    r"^String should match pattern.*": "a name",
    r"^(Tuple|List) should have (at \w+ \d+ items?).*": r"\2",
    r"^greater than or equal to": "at least",
    r"^less than or equal to": "at most",
    r"^(greater|less) than": r"a number \1 than",
    r"^an object": "keys and values",
    r"^a valid array": "a list",
}


class DataConfig(Section, name="data"):
    name: Literal["word_problems", "gsm8k", "gsm8k_aug"] = "word_problems"
    train_size: Count = 1000  # problems; 0 takes all
    validation_size: Positive = 200  # problems
    test_size: Positive = 200  # problems
    steps: Positive = 4  # arithmetic steps of a word problem
    copies: Count = 0  # number-perturbed copies per training problem at most; GSM8K data sets only
    seed: Seed = 0

    def __post_init__(self):
        if self.copies and self.name == "word_problems":
            raise ValueError(f"data.copies: got {self.copies} with word_problems, expected 0, or gsm8k or gsm8k_aug")


class BackboneConfig(Section, name="backbone"):
    name_or_path: Name = "scratch"  # "scratch": a GPT-2 of the shape below; else a folder or a Hub id
    n_layer: Positive = 1
    n_embd: Positive = 128
    n_head: Positive = 4
    n_positions: Positive = 128

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"backbone.n_head: got {self.n_head}, expected a divisor of n_embd={self.n_embd}")


class LoRAConfig(Section, name="lora"):
    r: Count = 0  # rank of the adapter that is trained in place of the weights; 0 trains the weights
    alpha: Positive = 16  # the adapter's output is multiplied by alpha / r
    targets: tuple[Name, ...] = ()  # names of linear maps, such as q_proj v_proj; empty: all in the decoder blocks


class CurriculumConfig(Section, name="curriculum"):
    control: Literal["coconut", "pause", "direct"] = "coconut"  # pause: no thought is fed back; direct: no latent step
    steps: Annotated[tuple[Positive, ...], Field(min_length=2)] = (10, 10)  # updates of stage 0 (explicit), 1, ...
    c_thought: Positive = 1  # latent thoughts per replaced step
    batch_size: Positive = 128  # problems per update
    micro_batch: Count = 0  # problems of similar length per forward pass, which saves padding; 0: the whole batch
    learning_rate: LearningRate = 3.0e-3
    betas: tuple[Rate, Rate] = (0.9, 0.98)
    weight_decay: Weight = 0.01
    warmup_steps: Count = 30  # updates, at the start of each stage
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1  # cosine end of each stage / learning_rate
    max_grad_norm: Above0 = 1.0
    decode_weight: Weight = 0.0  # weight of decoding each thought to its step's result (SIM-CoT); 0: plain Coconut
    mask: MaskSpec = MaskSpec()  # applied during latent stages
    eval_every: Positive = 25  # updates between validations in the last stage
    stop_accuracy: float = 1.0  # the last stage stops at this validation accuracy

    def __post_init__(self):
        if self.mask.scheme == "antithetic":
            raise ValueError(
                "curriculum.mask.scheme: got antithetic, expected shared; pairs are of one problem's rollouts"
            )


class GRPOConfig(Section, name="grpo"):
    arm: Arm = "shared"
    steps: Positive = 10  # iterations: a batch of B * K rollouts, then num_iterations updates
    num_problems: Positive = 32  # B, problems per iteration
    num_generations: Annotated[int, Field(ge=2, le=LARGEST)] = 16  # K, rollouts per problem, compared with each other
    max_candidates: Count = 0  # dynamic sampling: try up to this many problems to fill B with mixed groups; 0: off
    micro_batch: Count = 0  # problems per backward pass; 0: all
    memory_gib: Weight = 0.0  # GiB per backward pass beside weights and optimizer, in whole groups; 0: no limit
    num_iterations: Positive = 1  # mu, updates per batch of rollouts
    learning_rate: LearningRate = 3.0e-5
    warmup_steps: Count = 0
    weight_decay: Weight = 0.0
    max_grad_norm: Above0 = 1.0
    temperature: Above0 = 1.0  # of sampled answers; the greedy arms use 0
    mask: MaskSpec = MaskSpec()  # rate, sites and scope of the masked arms
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    scale_rewards: Literal["none", "group", "batch"] = "none"  # whose standard deviation divides the advantages
    loss_type: Literal["dr_grpo", "grpo", "dapo", "cispo"] = "dr_grpo"  # divisor of the sum over tokens, see loss.py
    importance_sampling_level: Literal["token", "sequence"] = "token"  # one ratio per token, or per answer
    epsilon: Above0 = 0.2  # ratios are clipped below 1 - epsilon
    epsilon_high: Above0 | None = None  # and above 1 + this (default: epsilon); cispo: the largest ratio, such as 5.0
    beta: Weight = 0.0  # weight of the k3 KL to the initial model; 0 needs no reference model
    eval_every: Positive = 50  # iterations between validations

    def __post_init__(self):
        if self.baseline == "none" and (self.scale_rewards != "none" or self.max_candidates):
            raise ValueError(
                "grpo.baseline: got none with scale_rewards or max_candidates, expected a baseline; without one, "
                "groups of equal rewards carry a gradient, and those two would divide it by 0 or drop it"
            )
        if self.arm == "antithetic" and self.num_generations % 2:
            got = f"got {self.num_generations} with arm antithetic, expected an even number"
            raise ValueError(f"grpo.num_generations: {got}; rollouts form pairs")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError(f"grpo.{CISPO_NEEDS}")
        if 0 < self.max_candidates < self.num_problems:
            least = f"at least num_problems={self.num_problems}, or 0 to take any group"
            raise ValueError(f"grpo.max_candidates: got {self.max_candidates}, expected {least}")
        rows = self.num_problems * self.num_generations
        if rows > LARGEST:
            raise ValueError(f"grpo.num_problems: got {rows} rollouts in an iteration, expected at most {LARGEST}")


class EvaluateConfig(Section, name="evaluate"):
    batch_size: Positive = 64  # problems per batch
    num_generations: Positive = 8  # rollouts per problem for pass@k and the majority


class SweepConfig(Section, name="sweep"):
    seeds: Some[Seed] = (0,)  # curriculum seeds
    arms: tuple[Arm, ...] = ("none", "temperature", "shared", "per_step", "shared_greedy", "supervised")
    controls: tuple[Literal["pause", "direct"], ...] = ("pause", "direct")
    learning_rates: Some[LearningRate] = (3.0e-5,)  # tried with the first seed
    rates: Some[Rate] = (0.1,)  # mask rates tried likewise
    temperatures: Some[Above0] = (1.0,)  # tried likewise, arm `temperature`
    tune_steps: Positive = 10  # iterations of each trial
    workers: Positive = 2  # one-thread processes in parallel


class Config(Section):
    preset: Name = "smoke"
    seed: Seed = 0
    max_new_tokens: Positive = 4  # longest answer, end-of-sequence token included
    # of matrix products (autocast); weights stay float32. auto: bfloat16 where the device has instructions for it
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    lora: LoRAConfig = LoRAConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    grpo: GRPOConfig = GRPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sweep: SweepConfig = SweepConfig()

    @property
    def latent_stages(self) -> int:
        return len(self.curriculum.steps) - 1

    @property
    def num_thoughts(self) -> int:
        return self.latent_stages * self.curriculum.c_thought


def check_arms(sweep: SweepConfig) -> None:
    """ValueError unless the main comparison is possible and no seed, arm or control occurs twice."""
    for arm in ("shared", "temperature"):
        if arm not in sweep.arms:
            raise ValueError(f"sweep.arms: got no {arm}, expected shared and temperature, which are compared; add it")
    for name in ("seeds", "arms", "controls"):
        values = getattr(sweep, name)
        if len(set(values)) < len(values):
            raise ValueError(f"sweep.{name}: got {values}, expected different ones, one per run folder; drop repeats")


def load_preset(name: str) -> Config:
    """The preset `name`. Raises a one-line ValueError for an unknown name or field, or a bad value."""
    values = _read_preset(name)
    if "inherits" in values:
        values = merged(_read_preset(values.pop("inherits")), values)
    return from_dict({**values, "preset": name})


def _read_preset(name: str) -> dict:
    known = sorted(path.stem for path in PRESETS.glob("*.toml"))
    if name not in known:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(known)}")
    return read_toml(PRESETS / f"{name}.toml")


def read_toml(path: Path) -> dict:
    """The contents of a TOML file. Raises a one-line ValueError if it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, nested without end
        raise ValueError(f"{path.name}: not valid TOML ({' '.join(str(error).split())[:300]}); correct it") from None


def merged(base: dict, changes: dict) -> dict:
    """Nested dicts: `changes` over `base`."""
    nested = {
        k: merged(base[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)
    }
    return {**base, **changes, **nested}


def from_dict(values: dict, kind: type[T] = Config) -> T:  # type: ignore[assignment]
    """A Config, or another Section, from nested dicts, as read from TOML or JSON. Raises a one-line ValueError."""
    try:
        # As JSON, where a strict dataclass may be an object and a strict tuple an array.
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except pydantic.ValidationError as error:
        raise ValueError(_one_line(error)) from None


def changed(config: Config, changes: dict) -> Config:
    """`config` with the fields that `changes`, nested dicts, name. Raises a one-line ValueError."""
    return from_dict(merged(to_dict(config), changes))


def to_dict(config: Section) -> dict:
    """Plain nested dicts and lists, as written to JSON."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def flat(values: dict, where: str = "") -> dict:
    """Nested dicts as one dict with dotted keys, {"grpo.steps": 10}."""
    found: dict = {}
    for key, value in values.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def changed_words(values: dict, *, but: tuple[str, ...] = ()) -> list[str]:
    """The command-line words that make its preset this config, but for fields that start with `but`."""
    base, words = flat(to_dict(load_preset(values["preset"]))), []
    for key, value in flat(values).items():
        if value != base.get(key) and not key.startswith(but):
            words += [f"--{key.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def arm_settings(grpo: GRPOConfig, arm: str) -> tuple[MaskSpec | None, float]:
    """(mask, temperature) of an arm; `supervised` samples nothing, under the curriculum's mask."""
    changes: dict[str, dict] = {
        "shared": {},
        "shared_greedy": {},
        "per_step": {"scheme": "per_step"},
        "antithetic": {"scheme": "antithetic"},
        "gaussian": {"noise": "gaussian", "sites": ("embedding",)},  # on <start> and thoughts
    }
    mask = dataclasses.replace(grpo.mask, **{"scheme": "shared", **changes[arm]}) if arm in changes else None
    return mask, 0.0 if arm in ("none", "shared_greedy") else grpo.temperature
