"""A page that runs the shipped model in the reader's browser: no server, no download, no kernel.

    playground_html(model) -> str    a fragment for a raw block of the book
    playground_page(model) -> str    a whole page, which opens from a folder as well

playground.js runs the model, draws the masks of latentlab/masks.py and grades; form.js shows it. This
module embeds the weights, a dozen problems and the seeds of their rollouts: row k under seed s of a
question has `rollout_seeds(s, 0, [id], K)[k]`, so that Python repeats each row of the page. The id of
a question of one's own is `ASK`.
"""

import base64
import json
from pathlib import Path
from string import Template

import numpy as np
from transformers import GPT2LMHeadModel

from latentlab.data.word_problems import PHRASES, word_problems
from latentlab.masks import rollout_seeds
from latentlab.model import LatentReasoner

ASK = "ask"
RUN_SEEDS, MOST_ROLLOUTS = 32, 16  # the ranges of the sliders
PROBLEMS = 12

HERE = Path(__file__).parent


def playground_html(model: LatentReasoner) -> str:
    """The playground as one HTML fragment, style, script and weights included. Errors as `playground_data`."""
    return Template(_read("playground.html")).substitute(
        style=_read("playground.css"),
        script=_read("playground.js") + _read("form.js"),
        data=json.dumps(playground_data(model)).replace("<", "\\u003c"),  # no tag inside a script
        last_seed=RUN_SEEDS - 1,
        most_rollouts=MOST_ROLLOUTS,
    )


def playground_page(model: LatentReasoner) -> str:
    """The playground as a whole page. Errors as `playground_data`."""
    return Template(_read("page.html")).substitute(playground=playground_html(model))


def playground_data(model: LatentReasoner) -> dict:
    """What the page embeds: shape, vocabulary, weights and seeds in base64, problems.

    Raises ValueError for a model other than a GPT-2 of one layer with fed-back thoughts.
    """
    config = model.lm.config
    if not isinstance(model.lm, GPT2LMHeadModel) or config.n_layer != 1 or model.feedback != "thought":
        got = f"{type(model.lm).__name__} with {config.num_hidden_layers} layers and feedback {model.feedback}"
        raise ValueError(f"playground: got {got}, expected a GPT-2 of one layer with fed-back thoughts; load 'tiny'")
    tensors = {name.removeprefix("h.0."): tensor for name, tensor in model.lm.transformer.state_dict().items()}
    problems = word_problems("test", PROBLEMS, seed=0)
    ids = [problem.id for problem in problems] + [ASK]
    seeds = [[rollout_seeds(s, 0, [id], MOST_ROLLOUTS).tolist() for s in range(RUN_SEEDS)] for id in ids]
    tokenizer = model.tokenizer
    return {
        "shape": {
            "width": config.n_embd,
            "heads": config.n_head,
            "positions": config.n_positions,
            "epsilon": config.layer_norm_epsilon,
            "thoughts": model.num_thoughts,
            "maxNewTokens": model.max_new_tokens,
            "special": model.end_id + 1,  # the ids below are not text
        },
        "vocab": tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
        "tensors": [[name, tensor.numel()] for name, tensor in tensors.items()],
        "weights": _base64(np.concatenate([tensor.float().numpy().ravel() for tensor in tensors.values()])),
        "seeds": _base64(np.array(seeds, dtype="<i8")),  # [problems + 1, RUN_SEEDS, MOST_ROLLOUTS]
        "runSeeds": RUN_SEEDS,
        "mostRollouts": MOST_ROLLOUTS,
        "verbs": {phrase.split()[0]: sign for sign, phrases in PHRASES.items() for phrase in phrases},
        "problems": [problem.question for problem in problems],
    }


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
