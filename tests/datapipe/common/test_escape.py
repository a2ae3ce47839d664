"""Text of strangers means nothing in spreadsheets, Markdown, TensorBoard and names of files."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown import markdown as rendered  # TensorBoard brings it

from crysforge.datapipe.common.escape import (
    cell,
    code_block,
    code_span,
    file_part,
    from_cell,
    markdown,
    one_line,
    tag,
)
from crysforge.datapipe.common.tables import number, read_rows, row_writer
from crysforge.trainer.base.distributed import World
from crysforge.trainer.figures.style import STYLE, new_figure, save_png
from crysforge.trainer.runs.logger import Logger
from tests.intrusions import MARKUP, Tags

ODD = st.text(st.sampled_from("'=+-@\t\r\n,\";1.e a＝")) | st.text()


@given(ODD)
@example("'=1")
@example("''")
def test_cells_come_back_and_are_no_formulas(text):
    found = cell(text)
    assert from_cell(found) == text
    assert not found.startswith(("=", "@", "\t", "\r", "\n", "＝"))
    if found.startswith(("+", "-")):
        float(found)


@pytest.mark.parametrize("text", ["1", "-1", "+1.5e-3", "-.5", "0.", "-inf", "a", "'a", "", "a=1"])
def test_numbers_and_plain_texts_stay(text):
    assert cell(text) == text == from_cell(text)


@given(st.lists(st.tuples(ODD, ODD, st.floats(allow_nan=False)), max_size=5))
def test_tables_come_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        write = row_writer(file)
        write(["id", "=name", "value"])
        for row in rows:
            write(row)
    if any("\ud800" <= c <= "\udfff" for row in rows for text in row[:2] for c in text):
        with pytest.raises(ValueError, match="is no table"):
            list(read_rows(path))
        return
    found = [(r["id"], r["=name"], number(r["value"], path)) for r in read_rows(path)]
    assert found == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,id\n1,2\n", "a column twice"),
        ("id,a\n1\n", "line 2 has 1 cells, not 2"),
        ("id,a\n1,2,3\n", "line 2 has 3 cells, not 2"),
        ("id\n" + "x" * 200_000, "is no table"),
    ],
)
def test_tables_that_are_none(text, words, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        list(read_rows(tmp_path / "a.csv"))
    assert "\n" not in str(error.value)
    (tmp_path / "b.csv").symlink_to("/etc/hosts")
    with pytest.raises(ValueError, match="link out of its directory"):
        list(read_rows(tmp_path / "b.csv"))


@pytest.mark.parametrize("text", MARKUP)
def test_markup_is_shown(text):
    page = rendered(
        f"| a |\n|---|\n| {markdown(text)} |\n\nText {markdown(text)}.", extensions=["extra"]
    )
    assert set(Tags(page).tags) == {"table", "thead", "tbody", "tr", "th", "td", "p"}
    page = rendered(f"Text {code_span(text)}.", extensions=["extra"])
    assert set(Tags(page).tags) <= {"p", "code"}
    page = rendered(f"a\n\n{code_block(text, 'yaml')}\n\nb", extensions=["extra"])
    assert [t for t in Tags(page).tags if t != "span"] == ["p", "pre", "code", "p"]


@given(st.text())
def test_lines_and_names_are_plain(text):
    assert "\n" not in markdown(text) and one_line(text).replace("\xa0", " ").isprintable()
    assert one_line(one_line(text)) == one_line(text)
    assert tag(text).isprintable() and len(tag(text)) <= 200
    part = file_part(text)
    assert len(part) < 100 and not set(part) & set("/\\\0\n") and not part.startswith((".", "-"))


@given(st.text(), st.text())
def test_different_texts_are_different_files(a, b):
    assert (file_part(a) == file_part(b)) == (a == b)


def test_plain_names_stay():
    for text in ("formation_energy_per_atom", "eV/atom", "R²", "a (b)", "A_B", "x*y"[:1]):
        assert markdown(text) == text
    assert tag("val/mae/gap") == "val/mae/gap" and file_part("_gap") == "_gap"
    assert markdown("5 < N & $") == "5 < N & $" and markdown("a_b") == "a_b"


def test_a_name_with_dollars_is_drawn(tmp_path):
    """Names and units are no formulas of TeX, which would end a run with an error."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(2)
        axes = figure.add_subplot()
        axes.set_title(r"$\frac$ and $x$")
        axes.set_xlabel(r"$\unknown{")
        save_png(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_curves_have_plain_names(tmp_path):
    logger = Logger(tmp_path, "vae", 0, 1, World(0, 1, 0, device="cpu"))
    logger.scalars(1, {"val/mae/<b>\n=x": 0.5})
    logger.close()
    (events,) = (tmp_path / "tensorboard" / "vae").iterdir()
    content = events.read_bytes()
    assert b"<b>" not in content and b"val/mae/%3cb%3e %3dx" in content
