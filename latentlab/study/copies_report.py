"""What number perturbation makes of GSM8K: how much, whether it is right, and 100 copies to be read.

`latentlab data --preset smol --copies-report reports` prints the copies to be read as JSON lines and writes
`perturb/perturb.json` into that folder. A person's verdict on each of them: reports/perturb/reading.md.
"""

import dataclasses
import json
import random
import time
from hashlib import sha256

from latentlab.config import Config
from latentlab.data import datasets
from latentlab.data.perturb import parse_step, perturb, skeleton, trace
from latentlab.problems import Problem, canonical_answer
from latentlab.study import results

READ = 100  # copies in the sample, drawn with SAMPLE_SEED
SAMPLE_SEED = 4
PINNED = 500  # the first training problems, whose copies have a sha256 of their own: quick to check


def write(config: Config, folder: str) -> None:
    """Measure `config.data.copies` copies of every GSM8K training problem; ValueError for another data set."""
    if config.data.name != "gsm8k" or not config.data.copies:
        got = f"data {config.data.name} with {config.data.copies} copies"
        raise ValueError(f"--copies-report: got {got}, expected gsm8k with copies: pass --preset smol")
    n, seed, started = config.data.copies, config.data.seed, time.time()
    train, validation, test = (datasets.gsm8k(split) for split in datasets.SPLITS)
    clock = time.process_time()
    fed = datasets.load(dataclasses.replace(config.data, train_size=0), "train")  # what a curriculum is given
    copies = {problem.id: [] for problem in train}
    for row in fed:
        if "~" in row.id:
            copies[row.id.rpartition("~")[0]].append(row)
    copies |= {problem.id: perturb(problem, n, seed) for problem in [*train, *validation] if not copies.get(problem.id)}
    seconds = time.process_time() - clock
    rows = [copy for problem in train for copy in copies[problem.id]]
    sample = random.Random(SAMPLE_SEED).sample(rows, READ)
    everything = [copy for several in copies.values() for copy in several]
    metrics = {
        # GSM8K's training set of 7,473 problems, of which 500 are held out for validation
        "all": counts([*train, *validation], copies),
        "without_validation": counts(train, copies),
        "training_rows": {
            "originals": sum("~" not in row.id for row in fed),
            "copies": sum("~" in row.id for row in fed),
        },
        "equations": sum(len(copy.steps) for copy in everything),
        "wrong_equations": sum(not equation_holds(step) for copy in everything for step in copy.steps),
        "wrong_answers": sum(not ends_at_answer(copy) for copy in everything),
        "originals_not_restored": sum(not restores(problem) for problem in [*train, *validation]),
        "held_out_in_training": {
            "questions": overlap(fed, [*validation, *test], lambda question: " ".join(question.split())),
            "but_for_numbers_and_names": overlap([row for row in fed if "~" in row.id], [*validation, *test], skeleton),
        },
        "cpu_seconds": seconds,
        "sha256": digest(rows),
        "sha256_first": digest([copy for problem in train[:PINNED] for copy in copies[problem.id]]),
        "read": [copy.id for copy in sample],
    }
    results.write_result(
        "perturb", preset="perturb", parameters={"copies": n, "data_seed": seed, "sample_seed": SAMPLE_SEED},
        metrics=metrics, started=started, seconds=time.time() - started, directory=folder,
        headline=f"{metrics['all']['perturbable']} of {metrics['all']['problems']} GSM8K training problems can be "
        f"perturbed: {metrics['all']['copies']} copies in {seconds:.0f} s on one core, {metrics['wrong_equations']} "
        f"of {metrics['equations']} equations wrong",
    )  # fmt: skip
    for copy in sample:
        print(json.dumps(dataclasses.asdict(copy), ensure_ascii=False))


def counts(problems: list[Problem], copies: dict[str, list[Problem]]) -> dict:
    perturbable = sum(bool(copies[problem.id]) for problem in problems)
    total = sum(len(copies[problem.id]) for problem in problems)
    return {
        "problems": len(problems),
        "perturbable": perturbable,
        "share": perturbable / len(problems),
        "copies": total,
    }


def equation_holds(step: str) -> bool:
    """Whether a step, parsed from its text alone, is exactly right."""
    equation = parse_step(step)
    return equation is not None and equation.holds()


def ends_at_answer(problem: Problem) -> bool:
    return canonical_answer(problem.steps[-1].rpartition("=")[2]) == problem.answer


def restores(problem: Problem) -> bool:
    """Whether the old numbers give back the old question and steps, byte for byte."""
    template = trace(problem)
    if template is None:
        return True
    numbers = template.recompute(template.values)
    return numbers is not None and template.write(numbers) == (problem.question, problem.steps)


def overlap(rows: list[Problem], held_out: list[Problem], key) -> int:
    """How many held-out problems have the key of some row."""
    keys = {key(row.question) for row in rows}
    return sum(key(problem.question) in keys for problem in held_out)


def digest(rows: list[Problem]) -> str:
    """sha256 of the rows as JSON lines."""
    text = "".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
    return sha256(text.encode()).hexdigest()
