"""Data sets: the synthetic word problems, and published sets read from a folder or the Hub.

No network is needed where the environment variable LATENTLAB_DATA names a folder with
gsm8k_{train,valid,test}.jsonl, gsm8k_flags.json, svamp.jsonl, multiarith.jsonl, gsm_hard.jsonl.
Sources: GSM8K (Cobbe et al. 2021, arXiv:2110.14168), GSM8K-Aug (Deng et al. 2023,
arXiv:2311.01460), SVAMP (arXiv:2103.07191), MultiArith (Roy & Roth 2015, arXiv:1608.01413),
GSM-Hard (arXiv:2211.10435), ASDiv-A (arXiv:2106.15772, as in Calc-X, arXiv:2305.15017), GSM-Plus
(arXiv:2402.19255).
"""

import os
import re
from hashlib import blake2b
from pathlib import Path

from latentlab.config import DataConfig
from latentlab.data.jsonl import read_jsonl
from latentlab.data.perturb import perturb, perturbed, skeleton
from latentlab.data.word_problems import SPLITS, word_problems
from latentlab.problems import Problem, canonical_answer, extract_answer, step_result
from latentlab.runtime.environment import TIMEOUT, hub_answers
from latentlab.runtime.files import read_json

BENCHMARKS = ("gsm8k", "gsm8k_perturbable", "gsm8k_perturbed", "svamp", "multiarith", "gsm_hard", "asdiv_a", "gsm_plus")

_FILES = {"train": "gsm8k_train.jsonl", "validation": "gsm8k_valid.jsonl", "test": "gsm8k_test.jsonl"}
_GSM8K_VALIDATION = 500  # problems taken out of GSM8K's training set, which has no validation split of its own

_HUB = {  # name: (address on the Hub, field of the chain, field of the answer)
    "gsm8k": (("openai/gsm8k", "main"), "answer", "answer"),
    "gsm8k-aug": (("whynlp/gsm8k-aug",), "steps", "answer"),
    "asdiv_a": (("MU-NLPC/Calc-asdiv_a",), None, "result"),
    "gsm_plus": (("qintongli/GSM-Plus",), None, "answer"),
}


def load(data: DataConfig, split: str) -> list[Problem]:
    """The problems that a preset's `data` section asks for; training rows have steps.

    `<split>_size` 0 takes all. With `copies`, number-perturbed copies of the training problems
    follow them (perturb/), drawn from `data.seed`. Validation and test never get copies, nor does
    a training problem that differs from one of theirs in names and numbers alone (GSM8K has one).
    """
    _check_name("split", split, SPLITS)
    size = getattr(data, f"{split}_size")
    if data.name == "word_problems":
        return word_problems(split, size, seed=data.seed, steps=data.steps)
    read = gsm8k_aug if data.name == "gsm8k_aug" else gsm8k
    rows = gsm8k("train", with_steps=True) if (data.name, split) == ("gsm8k", "train") else read(split)
    rows = rows[: size or None]
    if split != "train" or not data.copies:
        return rows
    held_out = {skeleton(problem.question) for other in ("validation", "test") for problem in read(other)}
    return rows + perturbed([row for row in rows if skeleton(row.question) not in held_out], data.copies, data.seed)


def gsm8k(split: str, *, data_dir: str | os.PathLike | None = None, with_steps: bool = False) -> list[Problem]:
    """GSM8K: 6,973 problems for train, 500 for validation, 1,319 for test.

    Read from the folder `data_dir`, by default LATENTLAB_DATA; without either from the Hub. Train
    and validation share no question. The folder's validation set is that of GSM8K-Aug, the Hub's
    the 500 training questions with the smallest blake2b: never to be mixed in one table.
    `with_steps` keeps only problems with a chain that ends at the answer (about 94 %), which a
    curriculum over steps needs; the reward does not.
    Raises ValueError for an unknown split or a bad file, FileNotFoundError for a missing file or
    Hub.
    """
    _check_name("split", split, SPLITS)
    folder = _folder(data_dir)
    problems = _gsm8k_from_hub(split) if folder is None else _gsm8k_from_folder(split, folder)
    return [problem for problem in problems if _ends_at_answer(problem)] if with_steps else problems


def gsm8k_aug(split: str) -> list[Problem]:
    """GSM8K-Aug, the paper's training set, from the Hub: 385,620, 500 and 1,319 problems.

    Rows without one numeric answer are left out. Errors as for `gsm8k`.
    """
    _check_name("split", split, SPLITS)
    return _from_hub("gsm8k-aug", split)


def benchmark(name: str, *, data_dir: str | os.PathLike | None = None) -> list[Problem]:
    """The evaluation problems of one data set.

    name: "gsm8k" (test split, folder or Hub) · "gsm8k_perturbable" and "gsm8k_perturbed" (GSM8K's
    validation problems that can be perturbed, as written and with fresh numbers: a model that
    reasons solves both as often; checkpoints were chosen on the former) · "svamp", "multiarith",
    "gsm_hard" (folder only) · "asdiv_a", "gsm_plus" (Hub only; without unanswerable questions).
    Raises ValueError for another name, otherwise as `gsm8k`.
    """
    _check_name("benchmark", name, BENCHMARKS)
    if name == "gsm8k":
        return gsm8k("test", data_dir=data_dir)
    if name in ("gsm8k_perturbable", "gsm8k_perturbed"):
        pairs = [(problem, perturb(problem, 1, seed=0)) for problem in gsm8k("validation", data_dir=data_dir)]
        return [fresh[0] if name == "gsm8k_perturbed" else problem for problem, fresh in pairs if fresh]
    if name in _HUB:
        return _from_hub(name, "test")
    folder = _folder(data_dir)
    if folder is None:
        raise FileNotFoundError(f"got no data folder, expected one with {name}.jsonl: set LATENTLAB_DATA to it")
    return read_jsonl(folder / f"{name}.jsonl")


def _check_name(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"got {what} {got!r}, expected one of {', '.join(known)}: pass one of them")


def _folder(data_dir: str | os.PathLike | None) -> Path | None:
    chosen = data_dir or os.environ.get("LATENTLAB_DATA")
    if chosen and not Path(chosen).is_dir():
        raise FileNotFoundError(f"no folder {chosen}: expected the data folder, correct LATENTLAB_DATA or data_dir")
    return Path(chosen) if chosen else None


def _ends_at_answer(problem: Problem) -> bool:
    try:
        return bool(problem.steps) and step_result(problem.steps[-1]) == problem.answer
    except ValueError:
        return False


def _gsm8k_from_folder(split: str, folder: Path) -> list[Problem]:
    problems = read_jsonl(folder / _FILES[split])
    if split != "train":
        return problems
    flags = folder / "gsm8k_flags.json"
    try:
        validation = set(read_json(flags, "the split of GSM8K", "train")["train"]["gsm8k_aug_valid_500"])
    except (KeyError, TypeError):
        ids = "a list of ids at train.gsm8k_aug_valid_500"
        raise ValueError(f"{flags}: got no {ids}, expected the validation ids: see data/README.md") from None
    return [problem for problem in problems if problem.id not in validation]


def _gsm8k_from_hub(split: str) -> list[Problem]:
    problems = _from_hub("gsm8k", "test" if split == "test" else "train")
    if split == "test":
        return problems
    ranked = sorted({p.question for p in problems}, key=lambda q: blake2b(q.encode(), digest_size=16).digest())
    held_out = set(ranked[:_GSM8K_VALIDATION])  # by question, so that a repeated question cannot be on both sides
    return [problem for problem in problems if (problem.question in held_out) == (split == "validation")]


def _from_hub(name: str, split: str) -> list[Problem]:
    """Rows of a Hub data set as problems; ids also count the rows without numeric answer."""
    address, chain, answer_field = _HUB[name]
    problems = []
    for index, row in enumerate(_load_from_hub(address, split)):
        where = f"{address[0]}, {split}, row {index}"
        try:
            question, raw = row["question"].strip(), row[answer_field]
            steps = tuple(re.findall(r"<<[^<>]*>>", "".join(row[chain]))) if chain else ()
            answer = canonical_answer((extract_answer(raw) if name == "gsm8k" else raw) or "")
        except (AttributeError, KeyError, TypeError) as error:
            got = f"fields {sorted(row)} ({type(error).__name__})"
            raise ValueError(
                f"{where}: got {got}, expected the published ones: set LATENTLAB_DATA to a folder"
            ) from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}: use another data set") from None
        if answer is not None:
            problems.append(Problem(f"{name}-{split}-{index:05d}", question, steps, answer, f"{name}/{split}"))
    if not problems:
        raise ValueError(f"{address[0]}, {split}: got no row with a numeric answer, expected some: clear its cache")
    return problems


def _load_from_hub(address: tuple[str, ...], split: str):
    remedy = "connect to it, set LATENTLAB_DATA to a folder that holds the data, or HF_HUB_OFFLINE=1 to use its cache"
    if not hub_answers():
        raise FileNotFoundError(f"got no answer from the Hub for {address[0]} within {TIMEOUT:g} s: {remedy}")
    try:
        import datasets

        datasets.disable_progress_bars()
        return datasets.load_dataset(*address, split=split)
    except Exception as error:  # many types: connection, permission, cache, format
        reason = " ".join(str(error).split())[:160]
        got = f"{type(error).__name__} from the Hub for {address[0]} ({reason})"
        raise FileNotFoundError(f"got {got}, expected its rows: {remedy}") from None
