"""The book: a first page, the notebooks as they were executed, docs and results, as a static site.

    build_book(out, [reports / "tiny", published / "tiny"], notebooks)    # what the first lacks, the second has
    python -m latentlab.study.book.build                                  # the published book: reports/book

The pages are collected in a temporary folder laid out like the repository, so that relative links
stay right; Sphinx (conf.py) makes HTML of them. No page requests anything from outside.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import nbformat
import sphinx_book_theme  # noqa: F401  # its absence is known before notebooks run, not after
from markupsafe import Markup

from latentlab.pretrained import load_model
from latentlab.runtime import environment, files
from latentlab.study.results import load_result, published_folder, reports_folder
from latentlab.teach.page.playground import playground_html
from latentlab.teach.thoughts import example

HERE = Path(__file__).parent
LESSONS = "[0-9][0-9]_*.ipynb"
FINDINGS = ("bases", "arms")  # results that can open the book, the preferred one first; one is published
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)[^)]*\)")  # Markdown, to a relative path


@dataclass
class Page:
    """A page of the book: its path without suffix, and what the first page says of it."""

    name: str
    title: str
    text: str
    figure: str = ""  # its path in the site
    seconds: float | None = None


def build_book(out: Path, folders: list[Path], notebooks: Path) -> Path:
    """Write the book into the folder `out`, replacing an earlier one; return its first page.

    folders: `<reports>/<preset>`, with results and executed notebooks, the preferred one first.
    notebooks: the folder of the committed ones, shown where no folder has executed them; docs lie
    beside it. Raises RuntimeError where Sphinx fails; the earlier book stays.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source, site = Path(temporary) / "source", Path(temporary) / "site"
        lessons, solutions = (sorted(notebooks.glob(f"{folder}{LESSONS}")) for folder in ("", "solutions/"))
        docs, reports = sorted(notebooks.parent.glob("docs/*.md")), dict.fromkeys(folder.parent for folder in folders)
        parts = {
            "Course": [_lesson(path, folders, source, site) for path in lessons],
            "Solutions": [_notebook(path, path, source / "notebooks" / "solutions" / path.name) for path in solutions],
            "Documentation": [_markdown(path, source / "docs" / path.name) for path in docs],
            "Results": [_results(folder, source) for folder in reports],
        }
        for page in (page for pages in parts.values() for page in pages):
            page.name = os.path.relpath(page.name, source)
        (source / "index.md").write_text(_first_page(parts, folders, site), encoding="utf-8")
        words = ["-q", "-b", "html", "-c", HERE, "-d", source.with_name("doctrees"), source, site]
        if code := subprocess.run([sys.executable, "-m", "sphinx", *map(str, words)]).returncode:
            raise RuntimeError(f"book: Sphinx ended with exit code {code}; its messages stand above")
        files.write_atomically(out, partial(shutil.copytree, site))
    files.remove(out.with_name(f"{out.name}.old"))
    return out / "index.html"


# ---------------------------------------------------------------- pages
def _lesson(path: Path, folders: list[Path], source: Path, site: Path) -> Page:
    """A notebook as executed, else as committed, and what its result says."""
    executed = next((folder / path.name for folder in folders if (folder / path.name).is_file()), path)
    page = _notebook(executed, path, source / "notebooks" / path.name)
    if found := _find(path.stem, folders):
        result, folder = found
        page.text, page.seconds = result.get("headline", page.text), result.get("seconds")
        page.figure = _figure(path.stem, folder, site)
    return page


def _notebook(executed: Path, home: Path, place: Path) -> Page:
    """Write a notebook to `place`; a figure without an alternative text gets the next sentence."""
    notebook = nbformat.read(executed, as_version=4)
    texts = [cell.source if cell.cell_type == "markdown" else "" for cell in notebook.cells]
    title, text = _describe(texts[0])
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            cell.source = _bring_files(cell.source, home.parent, place.parent)
        elif any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})):
            alt = next(filter(None, (_describe(text)[1] for text in texts[i:])), title)
            cell.metadata.setdefault("mystnb", {"image": {"alt": alt}})
    place.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, place)
    return Page(str(place.with_suffix("")), title, text)


def _markdown(path: Path, place: Path, head: str = "") -> Page:
    """Write a Markdown page to `place`."""
    text = path.read_text(encoding="utf-8")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(head + _bring_files(text, path.parent, place.parent), encoding="utf-8")
    return Page(str(place.with_suffix("")), *_describe(text))


def _results(reports: Path, source: Path) -> Page:
    """The page of all numbers of a result folder. It may quote models: no formulas."""
    place = source / "reports" / ("published" if reports == published_folder() else "") / "RESULTS.md"
    page = _markdown(reports / "RESULTS.md", place, "---\nmyst:\n  enable_extensions: []\n---\n")
    page.title = "Published results" if reports == published_folder() else "Your results"
    return page


def _bring_files(text: str, home: Path, place: Path) -> str:
    """Copy the files that a page links to; a link to a folder becomes text."""

    def bring(link: re.Match) -> str:
        target, copy = home / link[2], Path(os.path.normpath(place / link[2]))
        if target.is_file() and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, copy)
        return link[1] if target.is_dir() else link[0]

    return LINK.sub(bring, text)


def _describe(text: str) -> tuple[str, str]:
    """The title of a Markdown text and its first sentence, without markup."""
    prose = [part for part in re.split(r"\n\s*\n", text) if not re.match(r"\s*(#|<|\||```|!\[|\$\$)", part)]
    found = re.findall(r"^# (.*)", text, re.MULTILINE)[:1] or [""], prose[:1] or [""]
    title, first = (re.sub(r"[*`$]", "", LINK.sub(r"\1", " ".join(part.split()))) for (part,) in found)
    return title, re.split(r"(?<=[.:?!]) ", first)[0]


# ---------------------------------------------------------------- the first page
def _first_page(parts: dict[str, list[Page]], folders: list[Path], site: Path) -> str:
    """index.md: the finding, thoughts, the playground, a card per notebook, the docs."""
    finding, folder = next(filter(None, (_find(name, folders) for name in FINDINGS)))
    figure = _figure(finding["name"], folder, site)
    model = load_model("tiny")
    thoughts = example(model)._repr_html_()
    text = (HERE / "index.md.j2").read_text(encoding="utf-8")
    template = jinja2.Template(text, autoescape=True, trim_blocks=True, finalize=_one_line)
    markup = {"thoughts": Markup(thoughts), "playground": Markup(playground_html(model))}
    return template.render(parts=parts, finding=finding, figure=figure, **markup)


def _one_line(value):
    """Results may quote data: no value ends its block of HTML."""
    return value if isinstance(value, Markup) else " ".join(str(value).split())


def _find(name: str, folders: list[Path]) -> tuple[dict, Path] | None:
    """A result and the folder that has it."""
    found = ((load_result(folder / f"{name}.json"), folder) for folder in folders)
    return next(((result, folder) for result, folder in found if result), None)


def _figure(name: str, folder: Path, site: Path) -> str:
    """Copy a result's figure into the site, if there is one; return its path there."""
    if not (folder / f"{name}.png").is_file():
        return ""
    (site / "figures").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / f"{name}.png", site / "figures" / f"{name}.png")
    return f"figures/{name}.png"


if __name__ == "__main__":  # the committed notebooks and results, for a static host
    print(
        build_book(
            reports_folder() / "book", [published_folder() / "tiny"], environment.repository_root() / "notebooks"
        )
    )
