// The form and the table of the playground; playground.js computes them.

function startPlayground(root) {
  const { bytes, loadModel, readQuestion, group, solve, finalAnswer } = LatentPlayground;
  const part = (name) => root.querySelector(`.llp-${name}`);
  const data = JSON.parse(part("data").textContent), model = loadModel(data);
  const seeds = new BigInt64Array(bytes(data.seeds)); // [problems, then own questions][run seed][rollout]
  const own = data.problems.length;
  const problem = part("problem"), question = part("question");
  const sliders = ["rate", "seed", "count", "temperature"].map(part), [rate, seed, count, temperature] = sliders;

  function element(tag, name, ...children) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.append(...children);
    return made;
  }

  // A thought or answer, marked right or wrong; ringed where it differs from the row without a mask.
  function mark(text, right, clean) {
    const pill = element("span", `llp-pill llp-${right ? "right" : "wrong"}`, right ? "✓ " : "✗ ", text || "–");
    if (text !== clean) pill.classList.add("llp-changed");
    return element("td", "", pill);
  }

  const answer = (row) => row.text.replace(/^### ?/, "");

  // No reward and no advantage.
  function blank() {
    const cell = element("td", "");
    cell.colSpan = 2;
    return cell;
  }

  function tableRow(name, row, chain, clean) {
    const wanted = chain.map((step) => step.result);
    const line = element("tr", row === clean ? "llp-clean" : "", element("th", "", name));
    line.firstChild.scope = "row";
    row.thoughts.forEach((thought, i) => line.append(mark(thought, thought === wanted[i], clean.thoughts[i])));
    line.append(mark(answer(row), finalAnswer(row.text) === wanted.at(-1), answer(clean)));
    if (row === clean) return line.append(blank()), line;
    const bar = element("span", "llp-bar"), sign = row.advantage > 0 ? "+" : row.advantage < 0 ? "−" : "";
    bar.style.setProperty("--from", `${50 + Math.min(0, row.advantage) * 50}%`);
    bar.style.setProperty("--to", `${50 + Math.max(0, row.advantage) * 50}%`);
    const advantage = element("td", "llp-advantage", bar, sign + Math.abs(row.advantage).toFixed(2));
    line.append(element("td", "", String(row.reward)), advantage);
    return line;
  }

  function stepsRow(chain) {
    const line = element("tr", "llp-steps", element("th", "", "right steps"));
    line.firstChild.scope = "row";
    for (const { step, result } of chain)
      line.append(element("td", "", element("small", "", `${step} =`), ` ${result}`));
    line.append(element("td", "", chain.at(-1).result), blank());
    return line;
  }

  function verdict({ rows, mean, collapsed }) {
    const right = rows.filter((row) => row.reward).length;
    const [kind, reading] = collapsed
      ? ["collapsed", "all rewards are equal, every advantage is 0: no signal."]
      : ["mixed", "right answers are pushed up, wrong ones down."];
    const badge = element("strong", `llp-badge llp-${kind}`, kind);
    return [`Mean reward ${mean.toFixed(2)} `, badge, ` ${right} of ${rows.length} right: ${reading}`];
  }

  function show() {
    for (const slider of sliders) slider.previousElementSibling.lastElementChild.textContent = slider.value;
    let chain, refusal = "";
    try {
      chain = solve(data, model, question.value);
    } catch (error) {
      refusal = `${error.message}.`;
    }
    part("refusal").textContent = refusal;
    part("result").inert = question.ariaInvalid = Boolean(refusal);
    if (refusal) return;
    const first = (Number(problem.value) * data.runSeeds + seed.valueAsNumber) * data.mostRollouts;
    const chosen = Array.from(seeds.subarray(first, first + count.valueAsNumber));
    const settings = { rate: rate.valueAsNumber, temperature: temperature.valueAsNumber };
    const found = group(model, readQuestion(model, question.value), chain.at(-1).result, chosen, settings);
    const lines = found.rows.map((row, k) => tableRow(String(k + 1), row, chain, found.clean));
    part("rows").replaceChildren(stepsRow(chain), tableRow("no mask", found.clean, chain, found.clean), ...lines);
    part("verdict").replaceChildren(...verdict(found));
  }

  let waiting = false;
  function showSoon() {
    if (!waiting) requestAnimationFrame(() => ((waiting = false), show()));
    waiting = true;
  }

  data.problems.forEach((text, i) => {
    const moves = solve(data, model, text).map(({ step }) => step.replace(/^\d+ /, ""));
    problem.append(new Option(`${text.split(".")[0]}: ${moves.join(", ")}`, i));
  });
  problem.append(new Option("My own question", own));
  problem.addEventListener("change", () => {
    if (Number(problem.value) !== own) question.value = data.problems[problem.value];
    else question.focus();
    showSoon();
  });
  question.addEventListener("input", () => {
    problem.value = own;
    showSoon();
  });
  for (const slider of sliders) slider.addEventListener("input", showSoon);
  question.value = data.problems[0];
  show();
}

startPlayground(document.querySelector(".llp"));
