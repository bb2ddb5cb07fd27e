"""The playground of the book: JavaScript gives Python's masks, thoughts, answers and rewards; the page works."""

import json
import re
import shutil
import subprocess
import warnings

import pytest
import torch

from latentlab.advantage import group_advantages, is_collapsed
from latentlab.data.word_problems import word_problems
from latentlab.masks import MaskSpec, draw_masks, uniforms
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout
from latentlab.teach.page import playground
from tests.conftest import tiny_gpt2

RATES = (0.01, 0.05, 0.1, 0.3, 0.5)
TIE = 1e-4  # closest call, in logits or probability, that rounding may decide

COMPUTE = """(P, { data, rates, seeds, texts, cases, refused }) => {
  const model = P.loadModel(data);
  const each = (f) => seeds.map((seed) => f(BigInt(seed)));
  const message = (question) => { try { P.solve(data, model, question); } catch (error) { return error.message; } };
  return {
    masks: rates.map((rate) => each((seed) => Array.from(P.drawMask(seed, rate, 2 * model.width)))),
    uniforms: [0, 1, 2, 3].map((t) => each((seed) => P.uniform(seed, t))),
    answers: texts.map(P.finalAnswer),
    refused: refused.map(message),
    cases: cases.map(({ question, seeds }) => {
      const read = P.readQuestion(model, question);
      const rows = (temperature) =>
        seeds.map((seed) => P.rollout(model, read, { seed: BigInt(seed), rate: 0.1, temperature }));
      return { chain: P.solve(data, model, question), greedy: rows(0), sampled: rows(1) };
    }),
  };
}"""
NODE = f"""const given = JSON.parse(require("fs").readFileSync(0));
console.log(JSON.stringify(({COMPUTE})(require(process.argv[1]), given)));"""
REFUSED = {
    "Leo has 3 horses. He rides 2 away.": "Words: got horses, rides, expected",
    "Leo has 3 pens. He buys 2 more pens.": "Steps: got 1, expected",
    "He buys 2 more. He buys 2 more. He buys 2 more. He buys 2 more.": "Steps: got no “has” with a number, expected",
    "Leo has 3 pens. He buys 2. He loses 6. He gets 2 for each. He loses 2.": "Step 2: got 5 − 6 = -1, expected 0 to",
    "Leo has 3 pens. He splits 0 ways. He buys 2. He gets 2 for each. He loses 2.": "Step 1: got 3 ÷ 0 = Infinity,",
    "Leo has 3 pens. " * 40: "Length: got 202 words and marks, expected at most 120",
}


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
def chromium():
    """Headless Chromium, the distribution's package."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "playground.html"
    path.write_text(playground.playground_page(model), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module", params=["node", "chromium"])
def script(request, model, rollouts, address):
    """What playground.js computes for the same seeds, in node and in the browser."""
    if request.param == "node" and not shutil.which("node"):
        pytest.skip("node is not installed")
    rows = rollouts["greedy"]
    groups = [list(map(str, seeds)) for seeds in rows.seeds.view(-1, 8).tolist()]
    given = {
        "data": playground.playground_data(model),
        "rates": RATES,
        "seeds": groups[0],
        "texts": rollouts["odd"].text,
        "refused": list(REFUSED),
        "cases": [{"question": p.question, "seeds": seeds} for p, seeds in zip(rows.problems, groups, strict=True)],
    }
    if request.param == "chromium":
        page = request.getfixturevalue("chromium").new_page()
        page.goto(address)
        return page.evaluate(f"given => ({COMPUTE})(LatentPlayground, given)", given)
    command = ["node", "-e", NODE, str(playground.HERE / "playground.js")]
    return json.loads(subprocess.check_output(command, input=json.dumps(given), text=True, timeout=120))


def test_masks_and_uniform_numbers_are_bit_for_bit_those_of_python(model, rollouts, script):
    seeds = rollouts["greedy"].seeds[:8]
    for rate, values in zip(RATES, script["masks"], strict=True):
        assert torch.equal(torch.tensor(values), draw_masks(MaskSpec(rate=rate), model, seeds).values.flatten(1))
    assert script["uniforms"] == [uniforms(seeds, t).tolist() for t in range(4)]


@pytest.mark.parametrize("decoding", ["greedy", "sampled"])
def test_thoughts_and_answers_are_those_of_python(model, rollouts, script, decoding):
    out = rollouts[decoding]
    decoded = [[model.tokenizer.decode([t]) for t in row] for row in model.head(out.thoughts).argmax(-1).tolist()]
    rows = [row for case in script["cases"] for row in case[decoding]]
    got = [(row["thoughts"], row["text"]) for row in rows]
    differ = [i for i, want in enumerate(zip(decoded, out.text, strict=True)) if got[i] != want]
    named = [(out.problems[i // 8].id, int(out.seeds[i]), rows[i]["margin"]) for i in differ]
    assert all(margin < TIE for *_, margin in named), named
    if named:
        warnings.warn(f"{len(named)} of {len(rows)} rollouts differ in a tie: {named}", stacklevel=1)


def test_answers_are_graded_as_in_python(rollouts, script):
    problems = [problem for problem in rollouts["odd"].problems for _ in range(8)]
    graded = [float(found == p.answer) for found, p in zip(script["answers"], problems, strict=True)]
    assert graded == [exact_answer(text, p) for text, p in zip(rollouts["odd"].text, problems, strict=True)]
    assert 0 < sum(graded) < len(graded)


def test_chains_are_those_of_the_problems_and_other_questions_are_refused_in_one_line(rollouts, script):
    for problem, case in zip(rollouts["greedy"].problems, script["cases"], strict=True):
        said = [f"{step['step']} = {step['result']}" for step in case["chain"]]
        written = [re.sub(r"([-+*/=])", r" \1 ", step.strip("<>")) for step in problem.steps]
        assert said == [step.translate(str.maketrans("-*/", "−×÷")) for step in written]
    for message, start in zip(script["refused"], REFUSED.values(), strict=True):
        assert message.startswith(start) and "\n" not in message


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="got GPT2LMHeadModel with 2 layers and feedback thought, expected a GPT-2 of"):
        playground.playground_html(tiny_gpt2())


def table(page):
    """The texts of the table's cells, row by row."""
    return page.eval_on_selector_all(
        ".llp-rows tr", "rows => rows.map(r => Array.from(r.cells, c => c.innerText.trim()))"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_from_a_folder(chromium, address, width, scheme):
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults, requests = [], []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    rows, before = table(page), page.inner_text(".llp-rows")
    page.focus(".llp-rate")
    page.keyboard.press("End")
    page.wait_for_function("old => document.querySelector('.llp-rows').innerText !== old", arg=before)
    ground = page.eval_on_selector(".llp", "e => getComputedStyle(e).backgroundColor")
    page.evaluate("document.documentElement.dataset.theme = 'light'")  # as the book's switch does
    switched = page.eval_on_selector(".llp", "e => getComputedStyle(e).backgroundColor")
    fits = page.evaluate("document.documentElement.scrollWidth === innerWidth")
    unnamed = page.eval_on_selector_all("select, input, textarea", "all => all.filter(e => !e.labels.length).length")
    page.close()
    assert len(rows) == 2 + 8 and fits and not unnamed
    assert (faults, requests) == ([], [address])
    assert switched == "rgb(255, 255, 255)" and (ground == switched) == (scheme == "light")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place, run_seed", [(0, 0), (7, 31), (playground.PROBLEMS, 5)])
def test_the_table_is_that_of_python(model, chromium, address, place, run_seed, temperature):
    problems = word_problems("test", playground.PROBLEMS, seed=0)
    own = "Leo has 3 pens. He buys 2 more pens. He gets 4 for each. He loses 2 pens. He shares 3 ways evenly."
    asked = Problem(playground.ASK, own, (), "6", "page")
    problem = [*problems, asked][place]
    out = rollout(
        model,
        [problem],
        num_generations=8,
        masks=MaskSpec(rate=0.2),
        temperature=temperature,
        run_seed=run_seed,
        step=0,
    )
    page = chromium.new_page()
    page.goto(address)
    page.fill(".llp-question", own) if problem is asked else page.select_option(".llp-problem", str(place))
    for name, value in (("rate", 0.2), ("seed", run_seed), ("temperature", temperature)):
        page.fill(f".llp-{name}", str(value))
    page.evaluate("new Promise(requestAnimationFrame)")
    rows, verdict = table(page)[2:], page.inner_text(".llp-verdict")
    page.close()
    rewards = out.rewards(exact_answer)
    for k, cells in enumerate(rows):
        thoughts = [model.tokenizer.decode([t]) for t in model.head(out.thoughts[k]).argmax(-1).tolist()]
        assert [cell[2:] for cell in cells[1:5]] == thoughts
        assert cells[5][2:] == (out.text[k].removeprefix("### ") or "–")
        assert cells[6] == f"{rewards[0, k]:.0f}"
        assert abs(float(cells[7].replace("−", "-")) - group_advantages(rewards)[0, k]) < 0.00501  # two decimals
    mean, kind = re.match(r"Mean reward (\S+) (\w+)", verdict).groups()
    assert abs(float(mean) - rewards.mean()) < 0.00501
    assert kind == ("collapsed" if is_collapsed(rewards)[0] else "mixed")
