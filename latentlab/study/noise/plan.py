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

from pathlib import Path
from typing import Any, Literal

from latentlab.config import (
    ARMS,
    Above0,
    Config,
    Name,
    Positive,
    Section,
    Some,
    changed,
    from_dict,
    load_preset,
    read_toml,
)

PLANS = Path(__file__).parent
PLAIN = "plain"  # the base of all stages but map
STAGES = ("pilot", "main", "map", "long", "others", "readings")
FAMILY = {arm: "shared" for arm in ("per_step", "shared_greedy", "antithetic")}  # whose strength the pilot tunes
MEMORISE = {"num_problems": 16, "num_generations": 8, "learning_rate": 1.0e-3, "eval_every": 50}  # 128 problems a step
EPOCHS = 75  # over the problems to memorise, unless the base says otherwise


class Rule(Section, name="rule"):
    pilot: Positive  # bases that tune strengths and give the spread between bases
    least: Positive  # bases of the main contrast
    most: Positive
    half_width: Above0  # of its 95 % interval, points


class Main(Section, name="main"):
    arms: Some[Name]


class Others(Section, name="others"):
    bases: Positive
    arms: Some[Name]


class Map(Section, name="map"):
    steps: Positive  # iterations of each training
    seeds: Positive  # of each training
    test_size: Positive  # problems
    probe_size: Positive  # problems of each probe
    probes: Some[Name]  # noise that is measured without training
    arms: Some[Name]
    bases: dict[str, dict[str, Any]]  # settings of the curriculum; memorise: problems of the last stage; epochs


class Long(Section, name="long"):
    bases: Positive
    rollouts: Positive
    eval_every: Positive  # iterations
    arms: Some[Name]


class Readings(Section, name="readings"):
    bases: Positive
    problems: Positive
    rate: Above0  # of the masks on single sites and steps


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
        for family in ("temperature", "shared"):
            if f"{family} *" not in self.main.arms or family not in self.grids:
                raise ValueError(
                    f"plan: got no {family}, expected 'temperature *' and 'shared *' in main.arms and grids"
                )
        for label in (*self.main.arms, *self.others.arms, *self.map.arms, *self.map.probes, *self.long.arms):
            arm_changes(label.replace("*", "0.5"), self.config, {"temperature": 1.0, "shared": 1.0})
        for base in self.map.bases:
            self.base_config(base, 0)

    @property
    def config(self) -> Config:
        """The settings that all runs share."""
        return changed(load_preset(self.preset), self.settings)

    def base_config(self, base: str, seed: int) -> Config:
        """The settings of a base: those of its curriculum, the rest shared."""
        own = {key: value for key, value in self.map.bases.get(base, {}).items() if key not in ("memorise", "epochs")}
        return changed(self.config, {**own, "seed": seed})


def load_plan(name: str) -> Plan:
    """The plan of a TOML file, or one that comes with the library ("noise"). Raises a one-line ValueError."""
    path = PLANS / f"{name}.toml" if (PLANS / f"{name}.toml").is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"plan: got {name!r}, expected noise, or a TOML file like {PLANS / 'noise.toml'}")
    return from_dict(read_toml(path), Plan)


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
    if arm not in (*ARMS[1:-1],) or rest not in ([], ["seconds"]):
        raise ValueError(f"plan: got the label {label!r}, expected an arm and its strength, such as 'shared 0.05'")
    own: dict[str, Any] = {"temperature": strength} if arm == "temperature" else {"mask": {"rate": strength}}
    if rest:
        own["steps"] = round(g.steps * seconds["shared"] / seconds["temperature"])
    return {"grpo": {"arm": arm, **own}}
