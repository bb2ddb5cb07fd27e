"""A small book: what stands on its first page, links, alternative texts, nothing from outside."""

import base64
import re
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("sphinx_book_theme", reason="needs the packages of the extra `study`")
from bs4 import BeautifulSoup

from latentlab.runtime import environment
from latentlab.study.book.build import build_book
from latentlab.study.results import write_result

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
EVIL = "<script>alert(1)</script>"
BREAKOUT = f"one\n``````\n{EVIL}"
WIDGET = {
    "application/vnd.jupyter.widget-view+json": {"model_id": "0"},
    "text/html": "<table><tr><td>fallback</td></tr></table>",
    "application/javascript": "alert(2)",
}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The pages of a book of one lesson, its solution, one doc and a result folder, by path."""
    root = tmp_path_factory.mktemp("book")
    outputs = [
        new_output("stream", text=EVIL),
        new_output("display_data", data={"image/png": PNG, "text/plain": "<Figure>"}),
        new_output("display_data", data=WIDGET),
    ]
    links = "[doc](../docs/one.md#second-part) [code](../latentlab/one.py) [folder](../latentlab) [out](https://a.org)"
    cells = [
        new_markdown_cell(f"# 00 · A `lesson`\n\nIt says **this**. And more.\n\n{links}\n\n$$z_1 < \\dots, a_{{1}}$$"),
        new_code_cell("draw()", outputs=outputs),
        new_markdown_cell("## Next\n\nThe line *rises*. [Solutions](solutions/00_one.ipynb)"),
    ]
    page = "# One\n\nA doc.\n\n## Second part\n\n![curve](../latentlab/curve.png) [lesson](../notebooks/00_one.ipynb)"
    reports = root / "reports"
    for path, text in {
        "docs/one.md": page,
        "latentlab/one.py": "pass",
        "reports/RESULTS.md": f"# Results\n\n$1 and $2, {EVIL.replace('<', '&lt;')}, [all of it](tiny/arms.json)",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "notebooks" / "solutions").mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), root / "notebooks" / "00_one.ipynb")
    solved = new_notebook(cells=[new_markdown_cell("# Solved\n\n[back](../00_one.ipynb)")])
    nbformat.write(solved, root / "notebooks" / "solutions" / "00_one.ipynb")
    about = {"preset": "tiny", "parameters": {}, "metrics": {}, "started": 0.0, "seconds": 200.0}
    write_result("arms", question="Which?", headline=BREAKOUT, directory=reports, **about)
    write_result("00_one", headline=f'it "helps" {EVIL}', directory=reports, **about)
    for path in ("reports/tiny/arms.png", "reports/tiny/00_one.png", "latentlab/curve.png"):
        (root / path).write_bytes(base64.b64decode(PNG))
    (root / "book").mkdir()
    (root / "book" / "earlier.html").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "repository_root", lambda: root)
        first = build_book(root / "book", [reports / "tiny"], root / "notebooks")
    assert first == root / "book" / "index.html" and not (root / "book.old").exists()
    assert not (root / "book" / "earlier.html").exists()
    return {
        path: BeautifulSoup(path.read_text(), "html.parser")
        for path in first.parent.rglob("*.html")
        if "_static" not in path.parts
    }


def page(book, name):
    return next(soup for path, soup in book.items() if path.as_posix().endswith(f"book/{name}.html"))


def test_the_first_page_has_finding_thoughts_figure_playground_cards_and_docs(book):
    index = page(book, "index")
    assert index.select_one(".finding").text == f"one `````` {EVIL}"
    assert "thought 1" in index.select_one(".first-screen table").text
    assert index.select_one(".first-screen figure img")["src"] == "figures/arms.png"
    assert index.select_one(".llp textarea")
    (card,) = index.select("a.lesson")
    assert card["href"] == "notebooks/00_one.html" and "200" not in card.text and "3 minutes" in card.text
    assert card.strong.text == "00 · A lesson" and card.span.text == f'it "helps" {EVIL}'
    assert [link.text for link in index.select(".docs a")] == ["One", "Your results"]
    assert [caption.text for caption in index.select(".caption-text")] == [
        "Course",
        "Solutions",
        "Documentation",
        "Results",
    ]


def test_a_lesson_shows_figures_with_alternative_texts_formulas_and_fallbacks_of_widgets(book):
    lesson = page(book, "notebooks/00_one")
    (figure,) = lesson.select(".cell_output img")
    assert figure["alt"] == "The line rises."
    assert lesson.select_one("math[display=block]").find("mo", string="…")
    assert "fallback" in lesson.select_one(".cell_output table").text
    assert lesson.select_one(".cell_output pre").text.strip() == EVIL
    assert "folder" in lesson.text and not lesson.find("a", string="folder")
    assert not page(book, "reports/RESULTS").select("math")


def test_every_link_resolves_and_every_image_has_an_alternative_text(book):
    for path, soup in book.items():
        for tag in soup.select("[href], [src]"):
            target = urlsplit(tag.get("href") or tag.get("src"))
            if target.scheme:
                assert tag.name == "a" or target.scheme == "data", tag
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            assert file.is_file(), (path, tag)
            if target.fragment and file in book:
                assert book[file].find(id=unquote(target.fragment)), (path, tag)
            assert file.suffix not in (".ipynb", ".md"), (path, tag)
        assert all(image.get("alt") and not re.search(r"[0-9a-f]{40}", image["alt"]) for image in soup.select("img"))


def test_no_script_of_data_or_from_outside(book):
    for soup in book.values():
        scripts = soup.select("script")
        assert not any("alert(" in script.text or urlsplit(script.get("src", "")).scheme for script in scripts)
        assert soup.html["data-theme"] == "auto"
