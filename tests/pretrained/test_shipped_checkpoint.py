"""The shipped checkpoint is the one its provenance describes, and the baseline of the finished sweep's first seed."""

import json

import pytest

from latentlab.pretrained import loading
from latentlab.pretrained.loading import load_model
from latentlab.runtime import environment

FOLDER = loading.shipped_checkpoint("tiny")


@pytest.fixture
def provenance():
    return json.loads((FOLDER / "PROVENANCE.json").read_text())


def test_weights_are_those_of_the_provenance(provenance):
    assert loading.weights_hash(FOLDER)["sha256"] == provenance["sha256"]
    assert load_model(FOLDER).provenance["sha256"] == provenance["sha256"]


def test_scores_are_those_of_the_sweep(provenance):
    arms = json.loads((environment.repository_root() / "reports" / "published" / "tiny" / "arms.json").read_text())[
        "arms"
    ]
    row = next(arm for arm in arms if (arm["name"], arm["seed"]) == ("coconut", provenance["seed"]))
    assert provenance["test"] == {"n": row["n"], "correct": row["correct"]}
    assert provenance["validation_accuracy"] == row["validation_accuracy"]
    assert provenance["commit"] == row["commit"]


def test_smoke_takes_the_same_checkpoint_and_a_preset_without_one_says_how_to_train_it():
    assert loading.shipped_checkpoint("smoke") == FOLDER
    with pytest.raises(FileNotFoundError, match="latentlab curriculum --preset smol"):
        loading.shipped_checkpoint("smol")
