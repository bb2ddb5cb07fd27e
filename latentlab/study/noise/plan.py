"""The plan of the study: which bases, which arms, how many. One TOML file, such as noise.toml.

An arm is named by a label: the arm of `GRPOConfig` and its strength, which is the temperature of
`temperature`, else the mask rate.

    temperature 1.3         shared 0.05           as said
    shared *                the strength that the pilot chose for this family
    temperature * seconds   as many iterations as take the CPU seconds of "shared *"
    supervised once         each labelled problem that an arm sees, once
    supervised passes       as many sequences as an arm's rollouts, on as many problems as it sees
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from latentlab.config import (
    ARMS,
    Above0,
    Config,
    Count,
    Name,
    Positive,
    Section,
    Some,
    changed,
    from_dict,
    load_preset,
    read_toml,
    to_dict,
)

PLANS = Path(__file__).parent
PLAIN = "plain"  # the base of all stages but map
STAGES = ("pilot", "main", "map", "long", "others", "readings")
FAMILY = {arm: "shared" for arm in ("per_step", "shared_greedy", "antithetic")}  # whose strength the pilot tunes


class Rule(Section, name="rule"):
    pilot: Positive  # bases that tune strengths and give the spread between bases
    least: Positive  # bases of the main contrast
    most: Positive
    half_width: Above0  # of its 95 % interval, points

    def __post_init__(self):
        if self.pilot < 2 or self.least > self.most:
            got = f"got pilot {self.pilot}, least {self.least}, most {self.most}"
            raise ValueError(f"rule: {got}, expected pilot of at least 2 and least of at most most; correct them")


class Main(Section, name="main"):
    arms: Some[Name]


class Others(Section, name="others"):
    bases: Positive
    arms: Some[Name]


class MapBase(Section, name="map.bases"):
    curriculum: dict[str, Any] = Field(default_factory=dict)  # settings of the curriculum
    memorise: Count = 0  # problems of the last stage, to be known by heart; 0: the whole training set
    epochs: Positive = 75  # over the problems to memorise


class Map(Section, name="map"):
    steps: Positive  # iterations of each training
    seeds: Positive  # of each training
    test_size: Positive  # problems
    probe_size: Positive  # problems of each probe
    probes: Some[Name]  # noise that is measured without training
    arms: Some[Name]  # "temperature 1" and "shared 0.1", which are compared, among them
    bases: dict[str, MapBase]


class Long(Section, name="long"):
    bases: Positive
    rollouts: Positive
    eval_every: Positive  # iterations


class Readings(Section, name="readings"):
    bases: Positive
    problems: Positive
    rate: Above0  # of the masks


class Plan(Section, name="plan"):
    preset: Name
    settings: dict[str, Any]  # over the preset, for every run
    rule: Rule
    grids: dict[Literal["temperature", "shared", "gaussian"], Some[Above0]]
    main: Main
    others: Others
    map: Map
    long: Long
    readings: Readings

    def __post_init__(self):
        for section, needed, given in (
            ("grids", ("temperature", "shared"), self.grids),
            ("main.arms", ("temperature *", "shared *"), self.main.arms),
            ("map.arms", ("temperature 1", "shared 0.1"), self.map.arms),
            ("map.probes", ("temperature 1",), self.map.probes),
        ):
            if missing := [name for name in needed if name not in given]:
                raise ValueError(
                    f"plan: got {section} without {missing[0]!r}, expected it, as others are compared with it"
                )
        grid = [f"{family} {strength:g}" for family, strengths in self.grids.items() for strength in strengths]
        for label in (*grid, *self.main.arms, *self.others.arms, *self.map.arms, *self.map.probes):
            arm, star = label.split()[0], "*" in label
            if star and (label in self.map.arms + self.map.probes or FAMILY.get(arm, arm) not in self.grids):
                got = f"got the label {label!r}"
                raise ValueError(f"plan: {got}, expected a strength here, as no pilot tunes it; write a number")
            rates = {"temperature": 1.0, "shared": 1.0}
            changed(self.config, arm_changes(label.replace("*", "0.5"), self.config, rates))
        for base in self.map.bases:
            if not base.replace("_", "").isalnum():
                raise ValueError(f"map.bases: got the name {base!r}, expected letters, digits and _; rename it")
            self.base_config(base, 0)

    @property
    def config(self) -> Config:
        """The settings that all runs share."""
        return changed(load_preset(self.preset), self.settings)

    def base(self, name: str) -> MapBase:
        """How a base is made; one that the map does not have, as elsewhere."""
        return self.map.bases.get(name, MapBase())

    def base_config(self, base: str, seed: int) -> Config:
        """The settings of a base: those of its curriculum, the rest shared."""
        return changed(self.config, {"curriculum": self.base(base).curriculum, "seed": seed})

    def digest(self, stage: str) -> str:
        """Eight digits that change with what a unit of a stage does."""
        values = to_dict(self)
        parts = [values[name] for name in ("preset", "settings", "grids")] + [values.get(stage), self.rule.pilot]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def load_plan(name: str) -> Plan:
    """The plan of a TOML file, or one that comes with the library ("noise"). Raises a one-line ValueError."""
    path = PLANS / f"{name}.toml" if (PLANS / f"{name}.toml").is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"plan: got {name!r}, expected noise, or a TOML file like {PLANS / 'noise.toml'}")
    return from_dict(read_toml(path), Plan)


def run_name(label: str, run_seed: int = 0) -> str:
    """The name of a run's folder."""
    return f"{label.replace(' ', '_')}-r{run_seed}"


def arm_changes(label: str, config: Config, seconds: dict[str, float]) -> dict:
    """What the arm of a label without "*" changes in `config`.

    seconds: CPU seconds of an iteration of `temperature` and `shared`. Raises ValueError for a label
    of another form.
    """
    g, (arm, *words) = config.grpo, label.split()
    if arm == "supervised" and words in (["once"], ["passes"]):
        once = {"num_problems": g.num_problems // 2, "num_generations": 2}  # as many sequences as an arm has problems
        labels = {"data": {"train_size": g.steps * g.num_problems}}
        return {"grpo": {"arm": arm, **(once if words == ["once"] else {})}, **({} if words == ["once"] else labels)}
    try:
        strength, *rest = float(words[0]), *words[1:]
    except (ValueError, IndexError):
        strength, rest = 0.0, ["?"]
    if arm not in ARMS[1:-1] or rest not in ([], ["seconds"][: arm == "temperature"]):
        raise ValueError(f"plan: got the label {label!r}, expected an arm and its strength, such as 'shared 0.05'")
    own: dict[str, Any] = {"temperature": strength} if arm == "temperature" else {"mask": {"rate": strength}}
    if rest:
        own["steps"] = round(g.steps * seconds["shared"] / seconds["temperature"])
    return {"grpo": {"arm": arm, **own}}
