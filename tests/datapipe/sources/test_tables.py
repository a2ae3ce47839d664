"""Tables in any form: separators, headers, encodings, line ends, numbers, and columns that name
files."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.sources import Failure
from crysforge.datapipe.sources.values import MISSING, parse_label
from tests.salts import CASES, GAP_OF, GAPS, TEXTS, N, labelled, put, read, table

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|", "space": " "}
HEADERS = [(), ("file", "gap"), ("sample", "gap"), ("ID", "Gap"), ("whatever", " gap "),
           ('"Name"', "'gap'"), ("# id", "GAP")]  # fmt: skip
CALLED = {
    "files": "salt{}.cif",
    "ids": "salt{}",
    "case": "SALT{}",
    "relative": "./salt{}.cif",
    "folder": "cifs/salt{}.cif",
    "Unicode": "sàlt{}.cif",
    "elsewhere": "/home/me/cifs/salt{}.cif",
    "windows": "C:\\me\\cifs\\salt{}.cif",
}


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("header", HEADERS, ids=["none", *(h[0].strip('"# ') for h in HEADERS[1:])])
def test_a_table_in_a_folder_of_files(tmp_path, separator, header):
    folder = put(tmp_path / "cifs")
    text = table(
        [(f"salt{i}.cif", gap) for i, gap in enumerate(GAPS)], header, SEPARATORS[separator]
    )
    (folder / "labels.csv").write_text(text)
    assert labelled(folder) == GAP_OF


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("headed", [True, False])
def test_what_a_table_may_call_files(tmp_path, called, headed):
    composed = "\u0300" if called == "Unicode" else ""  # as file systems of Apple spell it
    folder = put(tmp_path / "cifs", f"sa{composed}lt{{}}.cif")
    rows = [(CALLED[called].format(i), gap) for i, gap in enumerate(GAPS)]
    (tmp_path / "labels.tsv").write_text(table(rows, ("name", "gap") if headed else (), "\t"))
    found = labelled(folder, labels=str(tmp_path / "labels.tsv"))
    assert {id.replace("\u0300", ""): gap for id, gap in found.items()} == GAP_OF
    (tmp_path / "labels.tsv").rename(folder / "labels.tsv")
    found = labelled(folder)
    assert {id.lower().replace("\u0300", ""): gap for id, gap in found.items()} == GAP_OF


def test_folders_may_stand_for_their_only_file(tmp_path):
    folder = put(tmp_path / "runs", "a/salt{}/relax/structure.cif")
    for form in ("salt{}", "a/salt{}/relax", "runs/a/salt{}/relax"):
        rows = [(form.format(i), gap) for i, gap in enumerate(GAPS)]
        (folder / "t.csv").write_text(table(rows, ("x", "gap")))
        assert list(labelled(folder).values()) == GAPS


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    rows = [(f"salt{i}", text.replace("\n", end), gap, "Grün") for i, (text, gap) in
            enumerate(zip(TEXTS, GAPS, strict=True))]  # fmt: skip
    header = ("Größe", "cif", "gap", "Bemerkung")
    data = table(rows, header, end=end).encode(encoding)
    (tmp_path / "a.csv").write_bytes(data)
    assert labelled(tmp_path / "a.csv", id_column="Größe") == GAP_OF
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(data))
    assert labelled(tmp_path / "b.csv.gz", id_column="größe") == GAP_OF
    (tmp_path / "c.csv").write_bytes(gzip.compress(data))  # by what it holds
    assert labelled(tmp_path / "c.csv", id_column="GRÖSSE") == GAP_OF
    folder = put(tmp_path / "cifs")
    rows = [(f"salt{i}", gap, "Grün") for i, gap in enumerate(GAPS)]
    text = table(rows, ("Größe", "gap", "Bemerkung"), end=end)
    (folder / "t.csv").write_bytes(text.encode(encoding))
    assert labelled(folder) == GAP_OF


@pytest.mark.parametrize("separator", [";", "\t", "|", " "])
def test_decimal_commas_are_read_where_commas_do_not_separate(tmp_path, separator):
    folder = put(tmp_path / "cifs")
    rows = [(f"salt{i}", f"{gap:.2f}".replace(".", ",")) for i, gap in enumerate(GAPS)]
    for header in ((), ("id", "gap")):
        (folder / "t.csv").write_text(table(rows, header, separator))
        assert labelled(folder) == GAP_OF
    rows = [(*r[:1], TEXTS[i], r[1]) for i, r in enumerate(rows)]
    if separator != " ":
        (tmp_path / "s.csv").write_text(table(rows, ("id", "cif", "gap"), separator))
        assert labelled(tmp_path / "s.csv") == GAP_OF


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (["1,5", "2.5"], r"column 'gap' has decimal commas and points \('1,5', '2.5'\)"),
        (["1,234", "12,345"], r"'1,234' in column 'gap' may be a decimal number or thousands"),
    ],
)
def test_commas_that_may_stand_for_thousands_are_refused(tmp_path, numbers, words):
    folder = put(tmp_path / "cifs", count=2)
    rows = [(f"salt{i}", x) for i, x in enumerate(numbers)]
    (folder / "t.csv").write_text(table(rows, ("id", "gap"), ";"))
    with pytest.raises(ValueError, match=words):
        read(folder)
    rows = [(f"salt{i}", TEXTS[i], x) for i, x in enumerate(numbers)]
    (tmp_path / "s.csv").write_text(table(rows, ("id", "cif", "gap"), ";"))
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "s.csv")


@pytest.mark.parametrize("word", sorted(MISSING | {"N/A", "None", "NaN", " - ", "NULL", "#N/A"}))
def test_words_for_what_nobody_measured(word):
    assert math.isnan(parse_label("gap", word))


@pytest.mark.parametrize(
    ("value", "number"),
    [("1.5", 1.5), (" -2 ", -2), ("−3.5", -3.5), ("1e-3", 1e-3), ("1.5D+02", 150), (".5", 0.5),
     ("+7.", 7), (3, 3), (2.5, 2.5), (True, 1)],
)  # fmt: skip
def test_numbers(value, number):
    assert parse_label("gap", value) == number


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1,5", "decimal comma; write a point"),
        ("1,234.5", "without commas between its digits"),
        ("1.234,5", "without commas between its digits"),
        ("1.5 eV", "leave the unit out of the table"),
        ("12 %", "leave the unit out"),
        ("inf", "finite number"),
        ("-Infinity", "finite number"),
        ("1_000", "finite number"),
        ("0x1A", "label 'gap' is '0x1A'"),
        ("metal", "finite number"),
        ([1.0], "finite number"),
        (float("inf"), "finite number"),
    ],
)
def test_what_is_no_number_says_what_to_do(value, words):
    with pytest.raises(BadCrystal, match=words):
        parse_label("gap", value)


def test_two_columns_of_one_name_are_an_error(tmp_path):
    folder = put(tmp_path / "cifs")
    rows = [(f"salt{i}", gap, gap + 1) for i, gap in enumerate(GAPS)]
    (folder / "t.csv").write_text(table(rows, ("id", "gap", " gap")))
    words = r"has 2 columns named 'gap' \(columns 2 and 3\): rename"
    with pytest.raises(ValueError, match=f"t.csv {words}"):
        read(folder)
    texts = [(f"salt{i}", gap, gap, TEXTS[i]) for i, gap in enumerate(GAPS)]
    (tmp_path / "s.csv").write_text(table(texts, ("id", "gap", "gap", "cif")))
    with pytest.raises(ValueError, match=f"s.csv {words}"):
        read(tmp_path / "s.csv")


def test_columns_of_one_name_but_for_case_are_told_apart(tmp_path):
    rows = [(f"salt{i}", TEXTS[i], gap, 99) for i, gap in enumerate(GAPS)]
    (tmp_path / "s.csv").write_text(table(rows, ("id", "cif", "gap", "Gap")))
    assert labelled(tmp_path / "s.csv") == GAP_OF
    assert {c.targets["Gap"] for c in read(tmp_path / "s.csv", ["Gap"])} == {99}


def test_columns_without_a_name_are_no_labels(tmp_path):
    rows = [(i, f"salt{i}", gap, "", "") for i, gap in enumerate(GAPS)]
    folder = put(tmp_path / "cifs")
    (folder / "t.csv").write_text(table(rows, ("", "id", "gap", "", "")))
    assert labelled(folder) == GAP_OF


def test_the_column_of_files_is_found_among_others(tmp_path):
    """Also where its name says nothing, another column counts, and a third repeats formulas."""
    folder = put(tmp_path / "cifs", "{}.cif")
    rows = [(N - i, "NaCl", i, gap, f"mp-{i}") for i, gap in enumerate(GAPS)]
    for header in (("rank", "formula", "probe", "gap", "note"), ("rank", "f", "file", "gap", "x")):
        (folder / "t.csv").write_text(table(rows, header))
        assert labelled(folder) == {str(i): gap for i, gap in enumerate(GAPS)}
    (folder / "t.csv").write_text(table(rows, ("rank", "formula", "file", "gap", "material_id")))
    assert labelled(folder) == {f"mp-{i}": gap for i, gap in enumerate(GAPS)}


def test_numbers_that_lost_their_zeros(tmp_path):
    folder = put(tmp_path / "cifs", "{:06d}.cif")
    rows = [(f"{i}.0" if i else "0", gap) for i, gap in enumerate(GAPS)]
    (folder / "t.csv").write_text(table(rows, ("sample", "gap")))
    assert [c.targets["gap"] for c in read(folder)] == GAPS
    assert len(labelled(folder)) == N
    (folder / "1.cif").write_text(TEXTS[5])  # now 1 may be two files
    names = [c.targets["gap"] for c in read(folder) if isinstance(c, Crystal)]
    assert GAPS[1] not in names


def test_a_path_is_never_another_folders_file(tmp_path):
    folder = put(tmp_path / "all", "a/salt{}.cif")
    rows = [(f"b/salt{i}.cif", gap) for i, gap in enumerate(GAPS)]
    (folder / "id_prop.csv").write_text(table(rows))
    assert {f.reason for f in read(folder) if f.id} == {"missing file", "not listed"}
    (folder / "id_prop.csv").rename(folder / "t.csv")
    with pytest.raises(ValueError, match=r"b/salt0\.cif"):
        read(folder / "t.csv")


def test_a_name_of_two_files_is_no_name(tmp_path):
    folder = put(put(tmp_path / "all", "a/salt{}.cif"), "b/salt{}.cif")
    rows = [(f"salt{i}.cif", gap) for i, gap in enumerate(GAPS)]
    (folder / "id_prop.csv").write_text(table(rows))
    reasons = [f.reason for f in read(folder) if isinstance(f, Failure)]
    assert reasons == ["missing file"] * N + ["not listed"] * 2 * N
    rows = [(f"{x}/salt{i}", gap) for i, gap in enumerate(GAPS) for x in "ab"]
    (folder / "id_prop.csv").write_text(table(rows))
    assert labelled(folder) == {f"{x}/{id}": gap for id, gap in GAP_OF.items() for x in "ab"}


@pytest.mark.parametrize("word", ["gap.csv", "id_prop_gap.csv"])
def test_of_several_tables_the_one_with_the_label(tmp_path, word):
    folder = put(tmp_path / "cifs")
    (folder / word).write_text(table([(f"salt{i}", gap) for i, gap in enumerate(GAPS)]))
    (folder / "id_prop_e.csv").write_text(table([(f"salt{i}", 7) for i in range(N)]))
    assert labelled(folder) == GAP_OF
    with pytest.raises(ValueError, match=r"several tables of labels .* say which with labels=.*"):
        read(folder, ["other"])


def test_tables_that_are_about_something_else(tmp_path):
    folder = put(tmp_path / "cifs")
    (folder / "README.txt").write_text("Salts.\nMeasured by hand; see the table.\n")
    (folder / "elements.csv").write_text("symbol,radius\nNa,1.02\nCl,1.81\n")
    (folder / "broken.csv").write_text('a,b\n1,2,3\n"4')
    (folder / "t.csv").write_text(table([(f"salt{i}", x) for i, x in enumerate(GAPS)]))
    notes: list[str] = []
    assert labelled(folder, notes=notes) == GAP_OF
    assert notes == [
        "labels are those of t.csv, whose column 1 names 12 of 12 files",
        "not read: 3 other files (README.txt, broken.csv, elements.csv)",
    ]


def test_without_a_header_columns_follow_the_targets(tmp_path):
    folder = put(tmp_path / "cifs")
    rows = [(f"salt{i}", "NaCl", gap, gap + 1) for i, gap in enumerate(GAPS)]
    (folder / "t.csv").write_text(table(rows))
    found = read(folder, ["gap", "other"])
    assert [c.targets for c in found] == [{"gap": g, "other": g + 1} for g in GAPS]
    with pytest.raises(ValueError, match=r"3 label column\(s\) without names, targets names 1"):
        read(folder)


def test_ids_of_a_column_that_is_named(tmp_path):
    folder = put(tmp_path / "cifs")
    rows = [(f"salt{i}.cif", f"sample {i}", gap) for i, gap in enumerate(GAPS)]
    for path in (folder / "t.csv", tmp_path / "t.csv"):
        path.write_text(table(rows, ("datei", "probe", "gap")))
    wanted = {f"sample {i}": gap for i, gap in enumerate(GAPS)}
    assert labelled(folder, id_column="Probe") == wanted
    assert labelled(tmp_path / "t.csv", id_column="Probe", structure_column="Datei") == wanted
    with pytest.raises(ValueError, match=r"no column 'prob': did you mean 'probe'"):
        read(folder, id_column="prob")


# Tables with structures


def test_a_quote_that_is_not_closed_swallows_nothing(tmp_path):
    folder = put(tmp_path / "cifs")
    text = table([(f"salt{i}", gap, "ok") for i, gap in enumerate(GAPS)], ("id", "gap", "note"))
    (folder / "t.csv").write_text(text.replace("-2.37,ok", '-2.37,"5'))
    with pytest.raises(ValueError, match=r"the quote in the row of line 5 is not closed"):
        read(folder)
    text = table([(f"salt{i}", gap, TEXTS[i]) for i, gap in enumerate(GAPS)], ("id", "gap", "cif"))
    (tmp_path / "s.csv").write_text("".join(text.rsplit('"', 1)))
    with pytest.raises(ValueError, match=r"s.csv.*the quote in the row of line \d+ is not closed"):
        read(tmp_path / "s.csv")


def test_a_column_of_structures_that_has_ids(tmp_path):
    put(tmp_path / "cifs")
    rows = [(f"salt{i}", gap) for i, gap in enumerate(GAPS)]
    (tmp_path / "t.csv").write_text(table(rows, ("cif", "gap")))
    assert labelled(tmp_path / "t.csv") == GAP_OF


def test_dictionaries_as_python_prints_them(tmp_path):
    lines = (CASES / "lines.json").read_text().splitlines()
    rows = [(f"salt{i}", json.loads(x)["structure"], GAPS[i]) for i, x in enumerate(lines)]
    (tmp_path / "s.csv").write_text(table(rows, ("id", "structure", "gap")))
    assert labelled(tmp_path / "s.csv") == GAP_OF


def test_structures_are_found_by_what_they_are(tmp_path):
    rows = [("rocksalt", gap, f"salt{i}", TEXTS[i]) for i, gap in enumerate(GAPS)]
    for name in ("CIF text", "Strukturdatei", "crystal"):
        (tmp_path / "s.csv").write_text(table(rows, ("structure", "gap", "sample", name)))
        assert labelled(tmp_path / "s.csv") == GAP_OF


def test_structures_without_a_header(tmp_path):
    rows = [(f"salt{i}", TEXTS[i], gap) for i, gap in enumerate(GAPS)]
    (tmp_path / "s.csv").write_text(table(rows))
    assert labelled(tmp_path / "s.csv") == GAP_OF
    (tmp_path / "n.csv").write_text(table([row[1:] for row in rows]))
    assert list(labelled(tmp_path / "n.csv").values()) == GAPS
    with pytest.raises(ValueError, match="has no header and 2 columns beside the structure"):
        read(tmp_path / "s.csv", ["a", "b", "c"])


@pytest.mark.parametrize("separator", [",", "\t", ";", " "])
def test_remarks_before_a_table(tmp_path, separator):
    folder = put(tmp_path / "cifs")
    rows = table([(f"salt{i}", gap) for i, gap in enumerate(GAPS)], (), separator, "\n")
    for header in ("", f"id{separator}gap\n", f"# id{separator}gap\n"):
        (folder / "t.csv").write_text(f"# measured, by hand\n# in eV\n{header}{rows}")
        assert labelled(folder) == GAP_OF
    if separator != " ":
        rows = table([(f"salt{i}", TEXTS[i], x) for i, x in enumerate(GAPS)], (), separator, "\n")
        for start in ("id", "# id", "#id"):
            header = separator.join((start, "cif", "gap"))
            (tmp_path / "s.csv").write_text(f"# exported; see above\n{header}\n{rows}")
            assert labelled(tmp_path / "s.csv") == GAP_OF


def test_what_spreadsheets_write(tmp_path):
    rows = [(f"salt{i}", TEXTS[i], f"{gap:.2f}".replace(".", ","), "", "") for i, gap in
            enumerate(GAPS)]  # fmt: skip
    text = "sep=;\r\n" + table([*rows, [""] * 5, [""] * 5], ("id", "cif", "gap"), ";")
    (tmp_path / "s.csv").write_text(text, encoding="utf-16")
    assert labelled(tmp_path / "s.csv") == GAP_OF


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.csv.gz", "id_prop.csv"])
@pytest.mark.parametrize("form", ["cifs/salt{}.cif", "salt{}", "data/cifs/salt{}.cif"])
def test_a_table_that_names_files_is_an_input(tmp_path, name, form):
    put(tmp_path / "data" / "cifs")
    text = table([(form.format(i), gap) for i, gap in enumerate(GAPS)], ("path", "gap"), "\t")
    path = tmp_path / "data" / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert labelled(path) == GAP_OF


def test_files_outside_of_the_tables_folder_need_leave(tmp_path):
    put(tmp_path / "cifs")
    (tmp_path / "tables").mkdir()
    path = tmp_path / "tables" / "t.csv"
    for start in ("../cifs", tmp_path / "cifs"):
        rows = [(f"{start}/salt{i}.cif", gap) for i, gap in enumerate(GAPS)]
        path.write_text(table(rows, ("cif", "gap")))
        with pytest.raises(ValueError, match=r"outside of its folder.*follow_links=true"):
            read(path)
        assert labelled(path, follow_links=True) == GAP_OF
    put(tmp_path / "tables", count=6)
    rows = [*((f"salt{i}.cif", GAPS[i]) for i in range(6)), (tmp_path / "cifs/salt7.cif", GAPS[7])]
    path.write_text(table(rows, ("cif", "gap")))
    notes: list[str] = []
    found = read(path, notes=notes)
    assert [f.reason for f in found if isinstance(f, Failure)] == ["missing file"]
    assert notes == ["1 file(s) that t.csv names (salt7.cif, …) lie outside of its folder; read "
                     "them with follow_links=true"]  # fmt: skip


def test_labels_in_a_table_for_any_input(tmp_path):
    rows = [(f"salt{i}", gap) for i, gap in enumerate(GAPS)]
    (tmp_path / "labels.csv").write_text(table(rows[::-1], ("name", "gap"), ";"))
    records = [{"id": f"salt{i}", "cif": text, "gap": None} for i, text in enumerate(TEXTS)]
    (tmp_path / "s.json").write_text(json.dumps(records))
    (tmp_path / "s.csv").write_text(table([(r["id"], r["cif"]) for r in records], ("id", "cif")))
    for name in ("s.json", "s.csv"):
        assert labelled(tmp_path / name, labels=str(tmp_path / "labels.csv")) == GAP_OF
    (tmp_path / "labels.csv").write_text(table([*rows[:3], ("ghost", 1)], ("name", "gap")))
    notes: list[str] = []
    found = labelled(tmp_path / "s.json", labels=str(tmp_path / "labels.csv"), notes=notes)
    assert len(found) == N and sum(map(math.isfinite, found.values())) == 3
    assert notes == ["labels.csv: column name names 3 of 12 crystals; 1 of its rows name none, "
                     "such as 'ghost'"]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("x", 1), ("y", 2)], r"lists no crystal of the input: column .* has 'x', 'y'"),
        ([("salt0", 1), ("salt0", 2)], r"lists 'salt0' more than once \(line 3\)"),
        ([("salt0", 5)], r"\(id 'salt0'\) has 'gap' '-3.0' and l.csv has '5': rename or remove"),
    ],
)
def test_labels_that_cannot_be_meant(tmp_path, rows, words):
    (tmp_path / "l.csv").write_text(table(rows, ("id", "gap")))
    rows = [(f"salt{i}", text, gap) for i, (text, gap) in enumerate(zip(TEXTS, GAPS, strict=True))]
    (tmp_path / "s.csv").write_text(table(rows, ("id", "cif", "gap")))
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "s.csv", labels=str(tmp_path / "l.csv"))
