"""Results: what is written is what was measured, what is generated follows from the files alone."""

import json
import math
import os

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from latentlab.runtime import environment, files
from latentlab.study import figures, results, tables

FIXED = {"parameters": {"seed": 0}, "started": 0.0, "seconds": 61.25, "environment": {"device": "cpu"}}
ARMS = [
    {
        "name": name,
        "seed": seed,
        "n": 200,
        "correct": 150 + seed,
        "interval": [0.70, 0.81],
        "rollouts": 512,
        "difference": {"points": 4.0 - seed, "low": 1.0 - seed, "high": 7.0 - seed, "discordant": 30},
    }
    for name in ("shared", "temperature")
    for seed in (0, 1)
]


@pytest.fixture
def reports(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path / "reports"))
    return tmp_path / "reports"


def write(name="01_toy", preset="tiny", metrics=None, **more):
    return results.write_result(name, preset=preset, metrics=metrics or {}, **{**FIXED, **more})


def test_a_result_comes_back_as_it_was_written(reports):
    metrics = {"a": np.float32(0.1), "b": torch.tensor([1.0, 2.0]), "c": 0.1 + 0.2, "zero": 0.0, "n": np.int64(3)}
    path = write(metrics=metrics, headline="h", question="q", arms=ARMS)
    result = results.read_result("01_toy", "tiny")
    assert path == reports / "tiny" / "01_toy.json"
    assert result["metrics"] == {"a": float(np.float32(0.1)), "b": [1.0, 2.0], "c": 0.1 + 0.2, "zero": 0.0, "n": 3}
    assert (result["arms"], result["headline"], result["question"]) == (ARMS, "h", "q")
    assert (result["schema_version"], result["started"], result["seconds"]) == (1, "1970-01-01T00:00:00+00:00", 61.25)
    assert [p.name for p in path.parent.iterdir()] == ["01_toy.json"]  # no temporary file stays


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor([1.0, math.nan])])
def test_nan_and_inf_are_refused_by_name_and_the_earlier_file_stays(reports, bad):
    before = write(metrics={"none": {"x": 1.0}}).read_bytes()
    with pytest.raises(ValueError, match=r"01_toy: metrics.none.x\S* is (nan|inf), expected a finite number") as error:
        write(metrics={"none": {"x": bad}})
    assert "\n" not in str(error.value)
    assert (reports / "tiny" / "01_toy.json").read_bytes() == before


@pytest.mark.parametrize(("name", "preset"), [("../x", "tiny"), ("x", "a/b"), ("", "tiny"), ("x", "..")])
def test_names_cannot_leave_the_result_folder(reports, name, preset):
    with pytest.raises(ValueError, match="expected letters, digits"):
        write(name, preset)
    assert not reports.exists()


def test_a_failed_write_leaves_no_part_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(tmp_path / "a.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_a_skipped_section_keeps_the_last_measured_one_with_its_date(reports):
    measured = {"none": {"x": 1.0}}
    write(metrics={"real": measured, "other": 1}, started="2026-01-01")
    for day in ("2026-01-02", "2026-01-03"):  # skipping twice keeps the measured date
        write(metrics={"real": {"skipped": "no Hub"}, "new": {"skipped": "no GPU"}}, started=day)
        metrics = results.read_result("01_toy", "tiny")["metrics"]
        assert metrics["real"]["skipped"] == "no Hub"
        assert metrics["real"]["last_measured"]["section"] == measured
        assert metrics["real"]["last_measured"]["started"] == "2026-01-01"
        assert metrics["new"] == {"skipped": "no GPU"}
    write(metrics={"real": measured})
    assert results.read_result("01_toy", "tiny")["metrics"] == {"real": measured}


def test_reading_prefers_the_users_own_result_to_the_published_one(reports, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "repository_root", lambda: tmp_path / "repository")
    published = tmp_path / "repository" / "reports" / "published"
    with pytest.raises(FileNotFoundError, match="run `latentlab study --preset tiny` first"):
        results.read_result("arms", "tiny")
    assert results.find_result("arms", "tiny") is None
    write("arms", headline="published", directory=published)
    for headline, folder in (("published", published), ("own", reports)):
        result = results.read_result("arms", "tiny")
        assert (result["headline"], result["folder"]) == (headline, folder / "tiny")
        write("arms", headline="own")
    (reports / "tiny" / "arms.json").write_text("{broken")
    with pytest.raises(ValueError, match="expected a result of schema 1"):
        results.read_result("arms", "tiny")


def test_the_users_own_folder_is_relative_to_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTLAB_REPORTS", "mine")
    assert write().resolve() == tmp_path / "mine" / "tiny" / "01_toy.json"
    monkeypatch.delenv("LATENTLAB_REPORTS")
    assert results.reports_folder() == environment.repository_root() / "reports"
    assert results.published_folder() == results.reports_folder() / "published"


def test_environment_names_versions_device_threads_and_weights():
    found = environment.environment({"source": "hub", "sha256": "0" * 64})
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"python", "transformers", "device"} <= set(found)
    assert found["weights"]["source"] == "hub"


def test_equal_figures_give_equal_bytes_and_leave_matplotlib_alone(reports):
    backend = matplotlib.get_backend(auto_select=False)
    pictures = []
    for _ in range(2):
        figure = Figure()
        left, right = figure.subplots(1, 2)
        figures.plot_arms(left, ARMS)
        figures.plot_curves(right, {"a": ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}, xlabel="iteration", ylabel="reward")
        pictures.append(figures.save_figure(figure, "01_toy", "tiny").read_bytes())
    assert pictures[0] == pictures[1]
    assert matplotlib.get_backend(auto_select=False) == backend


def test_arms_are_drawn_where_their_numbers_are():
    ax = Figure().subplots()
    figures.plot_arms(ax, ARMS)
    points = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
    assert points == [arm["difference"]["points"] for arm in ARMS]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["shared", "temperature"]
    ax = Figure().subplots()
    figures.plot_arms(ax, [{"name": "a", "n": 4, "correct": 1}, {"name": "unmeasured"}])
    assert ax.lines[-1].get_xdata()[0] == 25.0
    assert "pass@1" in ax.get_xlabel()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of a README and a page of docs with marked blocks."""
    root = tmp_path / "repository"
    block = "<!-- {0}:begin -->\nold\n<!-- {0}:end -->\n"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text("# T\n" + block.format("notebooks") + "between\n" + block.format("results"))
    (root / "docs" / "page.md").write_text(block.format("notebooks") + block.format("bench") + block.format("other"))
    monkeypatch.setattr(environment, "repository_root", lambda: root)
    return root


def test_the_report_is_generated_from_the_files_there_are(reports, repository):
    reports.mkdir()
    assert "## " not in tables.build_report().read_text()
    write(headline="all <b>zero</b> | ok", question="Why?", metrics={"real": {"skipped": "no Hub"}, "c": [1, 2]})
    write("01_toy", preset="smoke", headline="smoke is no result")
    write("arms", arms=[*ARMS, {"name": "pause"}])
    write("aside", preset="zeta")
    write("04_toy", directory=reports / "published")
    rehearsal = {"data": "word_problems", "cost": {"budget_minutes": 1}}
    write("arms", preset="tiny-cpu", headline="a rehearsal is no result", metrics=rehearsal)
    (reports / "zeta" / "broken.json").write_text("{")
    (reports / "list.json").write_text("[]")
    loose = json.loads((reports / "zeta" / "aside.json").read_text()) | {"name": "loose", "preset": ""}
    (reports / "loose.json").write_text(json.dumps(loose))
    before = [path.read_text() for path in (repository / "README.md", repository / "docs" / "page.md")]
    text = tables.build_report().read_text()
    assert "## loose\n" in text and "`make loose` · " in text and "[all of it](loose.json)" in text
    assert "| temperature | 75.0, +4.00 [+1.00, +7.00] | 75.5, +3.00 [+0.00, +6.00] |  |" in text
    assert (reports / "tiny" / "arms.png").is_file()
    assert "| real | no Hub |" in text
    assert "`latentlab study --only 01 --preset tiny` · " in text and "`latentlab sweep --preset tiny` · " in text
    assert "- list.json: not a result of this schema\n- zeta/broken.json: not" in text
    assert "is no result" not in text and "04_toy" not in text
    assert [path.read_text() for path in (repository / "README.md", repository / "docs" / "page.md")] == before
    assert tables.build_report().read_text() == text


def test_publishing_copies_results_and_regenerates_marked_blocks(reports, repository):
    published, readme, page = (repository / name for name in ("reports/published", "README.md", "docs/page.md"))
    tables.refresh_pages(repository)
    assert "No results yet: run `make study`." in readme.read_text() and "old" not in readme.read_text()
    assert "Not measured yet: run `make bench`." in page.read_text()

    write("00_first", directory=published, headline="published earlier")
    write(headline="all <b>zero</b> | ok", question="Why?")
    write("arms", arms=[*ARMS, {"name": "pause"}])
    write("01_toy", preset="smoke", headline="smoke is no result")
    for name in ("01_toy.png", "arms_outcomes.npz", "01_toy.html", "01_toy.ipynb", ".01_toy.done"):
        (reports / "tiny" / name).write_bytes(b"x")
    assert tables.publish() == published / "RESULTS.md"
    names = {"00_first.json", "01_toy.json", "01_toy.png", "arms.json", "arms.png", "arms_outcomes.npz", "thoughts.png"}
    assert {path.name for path in (published / "tiny").iterdir()} == names
    assert not (published / "smoke").exists()
    text, report = readme.read_text(), (published / "RESULTS.md").read_text()
    assert "| [01_toy](notebooks/01_toy.ipynb) | Why? | 61 |" in text
    assert "all &lt;b&gt;zero&lt;/b&gt; &#124; ok" in report and "published earlier" in report
    assert "| temperature | 75.0, +4.00 [+1.00, +7.00] | 75.5, +3.00 [+0.00, +6.00] |  |" in report
    assert text.startswith("# T\n") and "\nbetween\n" in text
    assert "[01_toy](../notebooks/01_toy.ipynb)" in page.read_text() and "other:begin -->\nold\n" in page.read_text()

    before = [path.read_bytes() for path in (published / "RESULTS.md", readme, page)]
    tables.publish()
    assert [path.read_bytes() for path in (published / "RESULTS.md", readme, page)] == before


def test_the_bench_page_has_tricks_whole_steps_and_the_comparison_of_two_checkouts(reports, repository):
    about = {"shape": "gpt2", "device": "cpu", "threads": 1}
    tricks = {"rollout": {"prefix_per_row": 2.25, "thoughts_per_row": 3.5}, "update": {"prefix_per_row": 2.5}}
    write(
        "cpu", preset="bench", parameters=about, metrics={"tricks": tricks, "tiny": {"seconds": {"validation": 0.25}}}
    )
    row = {"speedup": 3.25, "low": 3.0, "high": 3.5, "seconds_there": 0.75, "seconds_here": 0.25}
    metrics = {"rows": {"iteration_shared": row}, "different": [], "left_out": {}}
    write("against_gpt2", preset="bench", parameters={**about, "pairs": 9, "against": "0123"}, metrics=metrics)
    write("trials", preset="trials", headline="not faster", metrics={"compile": {"speedup": 0.5}})
    tables.publish()
    page = (repository / "docs" / "page.md").read_text()
    assert "not for every rollout | 2.25 | 2.50 |" in page and "for every rollout | 3.50 |  |" in page
    assert "not copied K times" not in page  # was not measured
    assert "| validation | 0.25 |" in page
    assert "| iteration_shared | 3.25 | 3.00 to 3.50 | 0.75 | 0.25 |" in page
    assert "(`latentlab bench --against FOLDER --shape gpt2 --device cpu --threads 1 --pairs 9`)" in page
    assert "not faster** (`python scripts/measure_trials.py`)" in page and "| compile.speedup | 0.5 |" in page


def test_the_commit_is_unknown_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "repository_root", lambda: tmp_path)
    assert environment.commit() == "unknown"


def test_write_is_plain_json(reports):
    assert json.loads(write().read_text())["arms"] == []
