// The playground of the book: the shipped model and its masks, in plain JavaScript.
//
// Tokenizer, masks, forward pass, answers, rewards; form.js is what the reader sees of it. Weights are
// float32, arithmetic is in doubles. tests/teach/test_page.py compares it with Python, whose names it
// has: latentlab/masks.py, rollouts.py, advantage.py.

"use strict";

const LatentPlayground = (() => {
  // -- random bits: splitmix64, as latentlab/masks.py -------------------------------------------

  const MASK_STREAM = 1n, SAMPLE_STREAM = 2n;
  const wrap = (x) => BigInt.asUintN(64, x);

  function mix(x) {
    x = wrap((x ^ (x >> 30n)) * 0xbf58476d1ce4e5b9n);
    x = wrap((x ^ (x >> 27n)) * 0x94d049bb133111ebn);
    return x ^ (x >> 31n);
  }

  // The upper 53 of the 64 bits for (seed, stream, counter), as a number.
  function bits(seed, stream, counter) {
    const key = mix(wrap(seed + stream * 0xd1342543de82ef95n));
    return Number(mix(wrap(key + BigInt(counter + 1) * 0x9e3779b97f4a7c15n)) >> 11n);
  }

  // Mask values of one rollout: 0 or 1 / (1 - rate), `count` = sites * width of them.
  function drawMask(seed, rate, count) {
    const kept = Math.fround(1 / (1 - rate)), scaled = rate * 2 ** 53;
    let dropped = Math.round(scaled);
    if (dropped - scaled === 0.5 && dropped % 2) dropped -= 1; // Python rounds half to even
    return Float64Array.from({ length: count }, (_, i) => (bits(seed, MASK_STREAM, i) >= dropped ? kept : 0));
  }

  const uniform = (seed, t) => bits(seed, SAMPLE_STREAM, t) * 2 ** -53;

  // -- model ------------------------------------------------------------------------------------

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;

  function loadModel(data) {
    const floats = new Float32Array(bytes(data.weights)), weights = {};
    let start = 0;
    for (const [name, size] of data.tensors) weights[name] = floats.subarray(start, (start += size));
    const ids = new Map(data.vocab.map((word, id) => [word, id]));
    return { ...data.shape, vocab: data.vocab, weights, ids };
  }

  // Token ids of question, newline and <start>, and the words that the model does not know.
  function encode(model, question) {
    const words = `${question}\n<|start-latent|>`.match(/\n|<<|>>|###|<\|[a-z-]+\|>|\d+|[A-Za-z]+|[^\sA-Za-z\d]/gu);
    const ids = words.map((word) => model.ids.get(word) ?? model.ids.get("<unk>"));
    return { ids, unknown: [...new Set(words.filter((word) => !model.ids.has(word)))] };
  }

  function dot(x, first, y, second, count) {
    let sum = 0;
    for (let i = 0; i < count; i++) sum += x[first + i] * y[second + i];
    return sum;
  }

  // x [rows] times the columns first ... first + count of a matrix [rows, columns], plus bias.
  function linear(model, name, x, first = 0, count = model.weights[`${name}.bias`].length - first) {
    const weight = model.weights[`${name}.weight`], bias = model.weights[`${name}.bias`];
    const y = new Float64Array(bias.subarray(first, first + count)), columns = bias.length;
    for (let i = 0; i < x.length; i += 4) { // four rows at a time: twice as fast
      const [a, b, c, d] = x.subarray(i, i + 4);
      for (let j = 0, at = i * columns + first; j < count; j++, at++)
        y[j] += a * weight[at] + b * weight[at + columns] + c * weight[at + 2 * columns] + d * weight[at + 3 * columns];
    }
    return y;
  }

  function norm(model, name, x) {
    const weight = model.weights[`${name}.weight`], bias = model.weights[`${name}.bias`];
    const mean = x.reduce((a, b) => a + b) / x.length;
    const variance = x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length;
    return x.map((v, i) => ((v - mean) / Math.sqrt(variance + model.epsilon)) * weight[i] + bias[i]);
  }

  const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
  const argmax = (x) => x.reduce((best, v, i) => (v > x[best] ? i : best), 0);

  const embed = (model, id) =>
    new Float64Array(model.weights["wte.weight"].subarray(id * model.width, (id + 1) * model.width));

  function atPosition(model, input, position) {
    return input.map((v, i) => v + model.weights["wpe.weight"][position * model.width + i]);
  }

  // Keys and values of the question, which is run once for all rollouts: one [keys, values] a position.
  function readQuestion(model, text) {
    const { ids } = encode(model, text);
    return ids.slice(0, -1).map((id, position) => {
      const x = norm(model, "ln_1", atPosition(model, embed(model, id), position));
      const both = linear(model, "attn.c_attn", x, model.width);
      return [both.subarray(0, model.width), both.subarray(model.width)];
    });
  }

  // One position through the layer: -> its last hidden state. Its keys and values join `cache`.
  function forward(model, cache, input, mask) {
    const width = model.width, size = width / model.heads;
    const x = atPosition(model, input, cache.length);
    const qkv = linear(model, "attn.c_attn", norm(model, "ln_1", x));
    cache.push([qkv.subarray(width, 2 * width), qkv.subarray(2 * width)]);
    const mixed = new Float64Array(width);
    for (let start = 0; start < width; start += size) {
      const scores = cache.map(([keys]) => dot(qkv, start, keys, start, size) / Math.sqrt(size));
      const largest = Math.max(...scores), powers = scores.map((score) => Math.exp(score - largest));
      const total = powers.reduce((a, b) => a + b);
      cache.forEach(([, values], s) => {
        for (let i = start; i < start + size; i++) mixed[i] += (powers[s] / total) * values[i];
      });
    }
    const keep = (branch, site) => (mask ? branch.map((v, i) => v * mask[site * width + i]) : branch);
    const attention = keep(linear(model, "attn.c_proj", mixed), 0);
    const middle = x.map((v, i) => v + attention[i]);
    const mlp = keep(linear(model, "mlp.c_proj", linear(model, "mlp.c_fc", norm(model, "ln_2", middle)).map(gelu)), 1);
    return norm(model, "ln_f", middle.map((v, i) => v + mlp[i]));
  }

  function head(model, hidden) {
    const width = model.width, table = model.weights["wte.weight"];
    return Float64Array.from(model.vocab, (_, id) => dot(hidden, 0, table, id * width, width));
  }

  // -- rollouts ---------------------------------------------------------------------------------

  // The likeliest token, and how far it leads.
  function likeliest(logits) {
    const best = argmax(logits);
    return [best, logits[best] - Math.max(...logits.filter((_, id) => id !== best))];
  }

  // Token t of an answer by inverse CDF of a uniform number, and how far that is from the next edge.
  function sample(logits, temperature, seed, t) {
    const largest = Math.max(...logits);
    let total = 0;
    const cdf = Array.from(logits, (logit) => (total += Math.exp((logit - largest) / temperature)));
    const point = uniform(seed, t) * total;
    return [cdf.findIndex((sum) => sum > point), Math.min(...cdf.map((sum) => Math.abs(sum - point))) / total];
  }

  // One rollout: decoded thoughts, the text of the answer, and the closest call among its tokens:
  // below 1e-4 rounding may decide.
  function rollout(model, read, { seed = 0n, rate = 0, temperature = 0 } = {}) {
    const mask = rate > 0 ? drawMask(seed, rate, 2 * model.width) : null;
    const cache = read.slice(), thoughts = [], tokens = [], margins = [];
    let input = embed(model, model.ids.get("<|start-latent|>"));
    for (let i = 0; i < model.thoughts; i++) {
      input = forward(model, cache, input, mask);
      const [token, margin] = likeliest(head(model, input));
      thoughts.push(model.vocab[token]);
      margins.push(margin);
    }
    forward(model, cache, input, mask); // the last thought is masked as well, <end> is not
    let next = model.ids.get("<|end-latent|>"), margin;
    for (let t = 0; t < model.maxNewTokens; t++) {
      const logits = head(model, forward(model, cache, embed(model, next), null));
      [next, margin] = temperature ? sample(logits, temperature, seed, t) : likeliest(logits);
      margins.push(margin);
      if (next === model.ids.get("<eos>")) break;
      tokens.push(next);
    }
    const text = tokens.filter((id) => id >= model.special).map((id) => model.vocab[id]).join(" ");
    return { thoughts, text, margin: Math.min(...margins) };
  }

  // The one number after the last "###", or null; what is graded.
  function finalAnswer(text) {
    const numbers = text.includes("###") && text.split("###").pop().trim().split("\n")[0].match(/\d+/g);
    return numbers && numbers.length === 1 ? numbers[0] : null;
  }

  const SIGNS = { "+": "+", "-": "−", "*": "×", "/": "÷" };

  // The chain of a question in the words of the synthetic problems: [{ step: "15 − 8", result: 7 }, ...].
  // Throws an Error, one line for the reader, for a question that the model cannot be asked.
  function solve(data, model, question) {
    const { ids, unknown } = encode(model, question), verbs = Object.keys(data.verbs).join(", ");
    if (unknown.length) throw new Error(`Words: got ${unknown.join(", ")}, expected those of the examples and 0 to 29`);
    const most = model.positions - model.thoughts - model.maxNewTokens;
    if (ids.length > most) throw new Error(`Length: got ${ids.length} words and marks, expected at most ${most}`);
    const start = question.match(/\bhas (\d+)/);
    const moves = [...question.matchAll(new RegExp(`\\b(${verbs.replaceAll(", ", "|")}) (\\d+)`, "g"))];
    if (!start || moves.length !== model.thoughts)
      throw new Error(`Steps: got ${start ? moves.length : "no “has” with a number"}, expected “has” with a ` +
        `number, then ${model.thoughts} sentences with a number after one of ${verbs}`);
    let value = Number(start[1]);
    return moves.map(([, verb, operand], i) => {
      const sign = data.verbs[verb], n = Number(operand), step = `${value} ${SIGNS[sign]} ${n}`;
      value = { "+": value + n, "-": value - n, "*": value * n, "/": Math.floor(value / n) }[sign];
      if (!model.ids.has(String(value)))
        throw new Error(`Step ${i + 1}: got ${step} = ${value}, expected 0 to 29; change a number`);
      return { step, result: String(value) };
    });
  }

  // A group of rollouts, one per seed: with rewards, advantages (reward - mean) and the clean answer.
  function group(model, read, answer, seeds, settings) {
    const rows = seeds.map((seed) => rollout(model, read, { ...settings, seed }));
    for (const row of rows) row.reward = Number(finalAnswer(row.text) === answer);
    const mean = rows.reduce((sum, row) => sum + row.reward, 0) / rows.length;
    for (const row of rows) row.advantage = row.reward - mean;
    return { rows, mean, collapsed: mean === 0 || mean === 1, clean: rollout(model, read) };
  }

  return { bytes, drawMask, uniform, loadModel, readQuestion, rollout, finalAnswer, solve, group };
})();

if (typeof module === "object") module.exports = LatentPlayground;
