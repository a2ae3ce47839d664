"""Bytes to text: every encoding and compression that files come in."""

import bz2
import codecs
import gzip
import lzma

import pytest

from crysforge.datapipe.common import text
from crysforge.datapipe.common.text import decode

WORDS = "data_x\n_name 'Schröder Å'\n"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize(
    "data",
    [
        WORDS.encode(),
        codecs.BOM_UTF8 + WORDS.encode(),
        codecs.BOM_UTF16_LE + WORDS.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + WORDS.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + WORDS.encode("utf-32-le"),
        WORDS.encode("utf-16-le"),
        WORDS.encode("utf-16-be"),
        WORDS.replace("\n", "\r\n").encode(),
        WORDS.replace("\n", "\r").encode(),
    ],
)
def test_text_is_the_same_in_every_encoding(data, pack):
    notes = []
    assert decode(pack(data), notes) == WORDS
    assert notes == []


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_latin_1_is_read_and_said(encoding):
    notes = []
    assert decode(WORDS.encode(encoding), notes) == WORDS
    assert len(notes) == 1 and "line 2" in notes[0] and "Latin-1" in notes[0]


def test_what_is_no_text_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no text file"):
        decode(b"\x7fELF some\x00thing " * 9)
    with pytest.raises(ValueError, match="damaged"):
        decode(gzip.compress(WORDS.encode() * 50)[:-20])
    with pytest.raises(ValueError, match="utf-16-le"):
        decode(codecs.BOM_UTF16_LE + b"a")
    monkeypatch.setattr(text, "MAX_TEXT", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        decode(gzip.compress(bytes(2000)))
