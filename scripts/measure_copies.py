"""Number-perturbed copies of GSM8K: their number, their correctness, and a sample of 100 to read.

    python scripts/measure_copies.py [FOLDER]      default: the user's own result folder

For maintainers. Measures the copies of every GSM8K training problem as preset smol makes them,
prints the sample as JSON lines and writes `perturb/perturb.json` into FOLDER. A person's verdict on
each copy of the sample is in reports/published/perturb/reading.md.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

from latentlab.config import load_preset
from latentlab.data import datasets
from latentlab.data.perturb import parse_step, perturb, skeleton, trace
from latentlab.problems import Problem, canonical_answer
from latentlab.study import results

READ = 100  # copies in the sample, drawn with SAMPLE_SEED
SAMPLE_SEED = 4
PINNED = 500  # the first training problems: their copies have a sha256 of their own, quick to check


def measure(folder: Path | None = None) -> Path:
    """Measure the copies, print the sample, and return the path of the result file."""
    data, started = load_preset("smol").data, time.time()
    train, validation, test = (datasets.gsm8k(split) for split in datasets.SPLITS)
    everything, clock = [*train, *validation], time.process_time()  # GSM8K's training set; 500 of it are held out
    fed = datasets.load(replace(data, train_size=0), "train")  # what a curriculum is given
    fed_copies = [row for row in fed if "~" in row.id]
    copies: dict[str, list[Problem]] = {}
    for row in fed_copies:
        copies.setdefault(row.id.rpartition("~")[0], []).append(row)
    copies |= {p.id: perturb(p, data.copies, data.seed) for p in everything if p.id not in copies}
    seconds = time.process_time() - clock
    rows = [copy for problem in train for copy in copies[problem.id]]
    sample = random.Random(SAMPLE_SEED).sample(rows, READ)
    total, every_copy = _count(everything, copies), [copy for some in copies.values() for copy in some]
    equations = [step for copy in every_copy for step in copy.steps]
    wrong = sum(not _holds(step) for step in equations)
    metrics = {
        "all": total,
        "without_validation": _count(train, copies),
        "training_rows": {"originals": len(fed) - len(fed_copies), "copies": len(fed_copies)},
        "equations": len(equations),
        "wrong_equations": wrong,
        "wrong_answers": sum(not _ends_at_answer(copy) for copy in every_copy),
        "originals_not_restored": sum(not _is_restored(problem) for problem in everything),
        "held_out_in_training": {
            "questions": _overlap(fed, [*validation, *test], lambda question: " ".join(question.split())),
            "but_for_numbers_and_names": _overlap(fed_copies, [*validation, *test], skeleton),
        },
        "cpu_seconds": seconds,
        "sha256": digest(rows),
        "sha256_first": digest([copy for problem in train[:PINNED] for copy in copies[problem.id]]),
        "read": [copy.id for copy in sample],
    }
    for copy in sample:
        print(json.dumps(asdict(copy), ensure_ascii=False))
    return results.write_result(
        "perturb",
        preset="perturb",
        parameters={"copies": data.copies, "data_seed": data.seed, "sample_seed": SAMPLE_SEED},
        metrics=metrics,
        started=started,
        seconds=time.time() - started,
        directory=folder,
        headline=f"{total['perturbable']} of {total['problems']} GSM8K training problems can be "
        f"perturbed: {total['copies']} copies in {seconds:.0f} s on one core, {wrong} of {len(equations)} "
        f"equations wrong",
    )


def _count(problems: list[Problem], copies: dict[str, list[Problem]]) -> dict:
    numbers = [len(copies[problem.id]) for problem in problems]
    able, n = sum(map(bool, numbers)), len(problems)
    return {"problems": n, "perturbable": able, "share": able / n, "copies": sum(numbers)}


def _holds(step: str) -> bool:
    """Whether a step, parsed from its text alone, is exactly right."""
    equation = parse_step(step)
    return equation is not None and equation.holds()


def _ends_at_answer(problem: Problem) -> bool:
    return canonical_answer(problem.steps[-1].rpartition("=")[2]) == problem.answer


def _is_restored(problem: Problem) -> bool:
    """Whether the old numbers give back the old question and steps, byte for byte."""
    template = trace(problem)
    if template is None:
        return True
    numbers = template.recompute(template.values)
    return numbers is not None and template.write(numbers) == (problem.question, problem.steps)


def _overlap(rows: list[Problem], held_out: list[Problem], key) -> int:
    """How many held-out problems have the key of some row."""
    keys = {key(row.question) for row in rows}
    return sum(key(problem.question) in keys for problem in held_out)


def digest(rows: list[Problem]) -> str:
    """sha256 of the rows as JSON lines."""
    return sha256("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows).encode()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    measure(parser.parse_args().folder)
