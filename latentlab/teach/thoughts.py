"""The thoughts of a group of rollouts as a table: what each decodes to, right or wrong, and what follows.

    show_thoughts(load_model("tiny"), problem, rate=0.1, k=8, seed=0)

A thought is decoded by the model's own head: the most probable token. It is right if that is the
first token of the result of the step that the thought completes.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from latentlab.advantage import group_advantages
from latentlab.data.word_problems import word_problems
from latentlab.evaluation.thoughts import decode, right_thoughts
from latentlab.masks import MaskSpec
from latentlab.model import LatentReasoner
from latentlab.problems import Problem, extract_answer, step_result
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout

RIGHT, WRONG = "#007a5a", "#b34700"  # dark variants of Okabe-Ito's green and vermillion: legible on white


@dataclass(frozen=True)
class Train:
    """One train of thought: of the clean model, or of one rollout under a mask."""

    name: str  # "no mask", "mask 1", ...
    thoughts: tuple[str, ...]  # decoded
    right: tuple[bool | None, ...]  # per thought; None: no step is known
    answer: str
    reward: float | None  # None: the answer is not known
    advantage: float | None


@dataclass(frozen=True)
class ThoughtTable:
    """What `show_thoughts` returns: it shows itself as HTML in a notebook, else as text."""

    question: str
    results: tuple[str, ...]  # of the steps, where known
    answer: str  # "" where it is not known
    setting: str
    trains: tuple[Train, ...]  # the clean model first

    def __str__(self) -> str:
        head, *rows = self._cells()
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        return "\n".join([self.question, *lines, self._caption()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A table without a style sheet: signs and bold say what the colours say."""
        head, *rows = self._cells()
        body = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
        for train, row in zip(self.trains, rows, strict=True):
            marks = [None, *train.right, *[None] * (len(row) - 1 - len(train.right))]
            body.append("".join(_td(cell, mark) for cell, mark in zip(row, marks, strict=True)))
        lines = "\n".join(f"<tr>{line}</tr>" for line in body)
        question, caption = html.escape(self.question), html.escape(self._caption())
        return f"<p>{question}</p>\n<table>\n{lines}\n</table>\n<p><small>{caption}</small></p>"

    def _cells(self) -> list[list[str]]:
        """Header and rows as text, each thought with its sign."""
        steps = [f"thought {i}" for i in range(1, len(self.trains[0].thoughts) + 1)]
        rows = [["", *steps, "answer", "reward", "advantage"]]
        for train in self.trains:
            thoughts = [f"{z} {_sign(right)}".strip() for z, right in zip(train.thoughts, train.right, strict=True)]
            reward = "" if train.reward is None else f"{train.reward:g}"
            advantage = "" if train.advantage is None else f"{train.advantage:+.2f}"
            rows.append([train.name, *thoughts, train.answer, reward, advantage])
        return rows if self.answer else [row[:-2] for row in rows]

    def _caption(self) -> str:
        known = f"right: {', '.join(self.results)}; answer {self.answer}. " if self.answer else ""
        advantages = [train.advantage for train in self.trains if train.advantage is not None]
        signal = "" if not advantages else "mixed group. " if any(advantages) else "all equal: no signal. "
        return f"{known}{signal}{self.setting}"


def show_thoughts(
    model: LatentReasoner, question: Problem | str, *, rate: float = 0.1, k: int = 8, seed: int = 0, temperature=0.0
) -> ThoughtTable:
    """The clean train of thought, and those of k rollouts, each under its own mask.

    question: a Problem, or a text, for which rewards and right thoughts are not known. rate: of the
    shared masks; 0: none. seed: the run seed of the rollouts. temperature: of their answers; 0 is greedy.
    Raises ValueError, one line, where `rollout` and `MaskSpec` do.
    """
    problem = question if isinstance(question, Problem) else Problem("ask", question, (), "", "ask")
    settings = {"run_seed": seed, "step": 0, "temperature": temperature, "num_generations": k}
    clean = rollout(model, [problem], masks=None, **{**settings, "num_generations": 1, "temperature": 0.0})
    noisy = rollout(model, [problem], masks=MaskSpec("shared" if rate else "none", rate), **settings)
    results = tuple(step_result(step) for step in problem.steps)
    advantages: list[float | None] = [None] * k
    rewards: list[float | None] = [None] * (k + 1)
    if problem.answer:
        graded = noisy.rewards(exact_answer)
        advantages = group_advantages(graded).flatten().tolist() if k > 1 else advantages
        rewards = [*clean.rewards(exact_answer).flatten().tolist(), *graded.flatten().tolist()]
    names = ["no mask", *(f"mask {i + 1}" if rate else f"sample {i + 1}" for i in range(k))]
    decoded, answers = [*decode(model, clean), *decode(model, noisy)], [*clean.text, *noisy.text]
    trains = [
        Train(name, z, right_thoughts(model, z, results), extract_answer(text) or text.strip(), reward, advantage)
        for name, z, text, reward, advantage in zip(names, decoded, answers, rewards, [None, *advantages], strict=True)
    ]
    setting = (
        f"p = {rate:g}, K = {k}, seed {seed}, {f'temperature {temperature:g}' if temperature else 'greedy answers'}"
    )
    return ThoughtTable(problem.question, results, problem.answer, setting, tuple(trains))


def example(model: LatentReasoner) -> ThoughtTable:
    """The table that README and book show: the shipped model answers wrong, and two of eight masks repair it."""
    return show_thoughts(model, word_problems("train", 60, seed=0)[59], rate=0.1, k=8, seed=0)


def ask(model: LatentReasoner, question: str, *, rate: float = 0.1, k: int = 8, seed: int = 0) -> ThoughtTable:
    """`show_thoughts` of one's own question. Raises a one-line ValueError that names words the model does not know."""
    known, unknown = model.tokenizer.unk_token_id, []
    for word in question.replace("?", " ? ").replace(".", " . ").replace(",", " , ").split():
        if known is not None and known in model.tokenizer(word, add_special_tokens=False)["input_ids"]:
            unknown.append(word)
    if unknown or not question.strip():
        got = f"the words {', '.join(dict.fromkeys(unknown))}, which this model does not know" if unknown else "no text"
        raise ValueError(f"question: got {got}, expected words of its training; `latentlab data` prints examples")
    return show_thoughts(model, question, rate=rate, k=k, seed=seed)


def _sign(right: bool | None) -> str:
    return "" if right is None else "✓" if right else "✗"


def _td(cell: str, right: bool | None) -> str:
    text = html.escape(cell)
    if right is None:
        return f"<td>{text}</td>"
    return f'<td style="color: {RIGHT if right else WRONG}">{text if right else f"<b>{text}</b>"}</td>'
