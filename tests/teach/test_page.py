"""The playground of the book: JavaScript gives Python's masks, thoughts, answers and rewards; the page works."""

import json
import shutil
import subprocess
import warnings

import pytest
import torch

from latentlab.data.word_problems import word_problems
from latentlab.masks import MaskSpec, draw_masks, uniforms
from latentlab.pretrained.loading import load_model
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout
from latentlab.teach.page import playground

RATES = (0.01, 0.05, 0.1, 0.3, 0.5)
TIE = 1e-4  # closest call, in logits or probability, that rounding may decide

SCRIPT = """
const { readFileSync } = require("fs"), P = require(process.argv[1]);
const { data, rates, seeds, texts, cases } = JSON.parse(readFileSync(0));
const model = P.loadModel(data);
const run = ({ question, seeds }) => {
  const read = P.readQuestion(model, question);
  const rows = (temperature) =>
    seeds.map((seed) => P.rollout(model, read, { seed: BigInt(seed), rate: 0.1, temperature }));
  return { greedy: rows(0), sampled: rows(1) };
};
const both = (f) => seeds.map((seed) => f(BigInt(seed)));
console.log(JSON.stringify({
  masks: rates.map((rate) => both((seed) => Array.from(P.drawMask(seed, rate, 2 * model.width)))),
  uniforms: [0, 1, 2, 3].map((t) => both((seed) => P.uniform(seed, t))),
  answers: texts.map(P.finalAnswer),
  cases: cases.map(run),
}));
"""


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def rollouts(model):
    """200 validation problems x 8 masks, greedy, sampled and, for odd texts, at a high temperature."""
    sizes = {"num_generations": 8, "masks": MaskSpec(rate=0.1), "run_seed": 0, "step": 0}
    problems = word_problems("validation", 200, seed=0)
    return {
        name: rollout(model, problems, temperature=t, **sizes)
        for name, t in [("greedy", 0.0), ("sampled", 1.0), ("odd", 4.0)]
    }


@pytest.fixture(scope="module")
def node(model, rollouts):
    """What playground.js computes for the same seeds."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    rows = rollouts["greedy"]
    groups = [list(map(str, seeds)) for seeds in rows.seeds.view(-1, 8).tolist()]
    given = {
        "data": playground.playground_data(model),
        "rates": RATES,
        "seeds": groups[0],
        "texts": rollouts["odd"].text,
        "cases": [{"question": p.question, "seeds": seeds} for p, seeds in zip(rows.problems, groups, strict=True)],
    }
    command = ["node", "-e", SCRIPT, str(playground.HERE / "playground.js")]
    return json.loads(subprocess.check_output(command, input=json.dumps(given), text=True, timeout=120))


def test_masks_and_uniform_numbers_are_bit_for_bit_those_of_python(model, rollouts, node):
    seeds = rollouts["greedy"].seeds[:8]
    for rate, values in zip(RATES, node["masks"], strict=True):
        assert torch.equal(torch.tensor(values), draw_masks(MaskSpec(rate=rate), model, seeds).values.flatten(1))
    assert node["uniforms"] == [uniforms(seeds, t).tolist() for t in range(4)]


@pytest.mark.parametrize("decoding", ["greedy", "sampled"])
def test_thoughts_and_answers_are_those_of_python(model, rollouts, node, decoding):
    out = rollouts[decoding]
    decoded = [[model.tokenizer.decode([t]) for t in row] for row in model.head(out.thoughts).argmax(-1).tolist()]
    rows = [row for case in node["cases"] for row in case[decoding]]
    got = [(row["thoughts"], row["text"]) for row in rows]
    differ = [i for i, want in enumerate(zip(decoded, out.text, strict=True)) if got[i] != want]
    named = [(out.problems[i // 8].id, int(out.seeds[i]), rows[i]["margin"]) for i in differ]
    assert all(margin < TIE for *_, margin in named), named
    if named:
        warnings.warn(f"{len(named)} of {len(rows)} rollouts differ in a tie: {named}", stacklevel=1)
    assert len(named) <= 3


def test_answers_are_graded_as_in_python(rollouts, node):
    problems = [problem for problem in rollouts["odd"].problems for _ in range(8)]
    graded = [float(found == p.answer) for found, p in zip(node["answers"], problems, strict=True)]
    assert graded == [exact_answer(text, p) for text, p in zip(rollouts["odd"].text, problems, strict=True)]
    assert 0 < sum(graded) < len(graded)
