import json
import sqlite3
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regrpo.tools.glyphs import CELL_HEIGHT, CELL_WIDTH, CHARACTERS, draw_page, read_page
from regrpo.workspace import (
    LinkFile,
    PageFile,
    SqliteFile,
    TextFile,
    build_workspace,
    file_from_dict,
    file_to_dict,
)

FILES = (
    TextFile("notes.txt", "line\r\nnext"),
    LinkFile("folder/link", "../notes.txt"),
    SqliteFile("shop.db", "CREATE TABLE t(a); INSERT INTO t VALUES (1), (2);"),
    PageFile("page.png", (160, 120), ((3, 5, "total 42"),)),
)
VISIBLE = CHARACTERS.replace(" ", "")


def test_every_kind_is_built(tmp_path):
    build_workspace(tmp_path, FILES)
    assert (tmp_path / "notes.txt").read_bytes() == b"line\r\nnext"
    assert (tmp_path / "folder/link").readlink().as_posix() == "../notes.txt"
    assert (tmp_path / "folder/link").read_bytes() == b"line\r\nnext"
    connection = sqlite3.connect(tmp_path / "shop.db")
    assert connection.execute("SELECT sum(a) FROM t").fetchall() == [(3,)]
    connection.close()
    with Image.open(tmp_path / "page.png") as page:
        assert page.size == (160, 120)
        assert [line.text for line in read_page(page)] == ["total 42"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt", "folder", "shop.db", "page.png"
    }  # fmt: skip


def test_files_survive_json():
    for file in FILES:
        assert file_from_dict(json.loads(json.dumps(file_to_dict(file)))) == file
        assert hash(file_from_dict(file_to_dict(file))) == hash(file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "kind"),
        ({"kind": "fifo", "path": "a"}, "kind"),
        ({"kind": ["text"]}, "kind"),
        ({"kind": "text", "path": "a"}, "content"),
        ({"kind": "text", "path": "a", "content": 1}, "content"),
        ({"kind": "text", "path": 1, "content": ""}, "path"),
        ({"kind": "text", "path": "a", "content": "", "mode": 0}, "mode"),
        ({"kind": "page", "path": "a", "size": [1], "lines": []}, "page"),
        ({"kind": "page", "path": "a", "size": "ab", "lines": []}, "int"),
        ({"kind": "page", "path": "a", "size": [50, 50], "lines": [[0, 0, 7]]}, "text"),
    ],
)
def test_malformed_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        file_from_dict(fields)


@pytest.mark.parametrize(
    "files",
    [
        [TextFile("/etc/x", "")],
        [TextFile("../x", "")],
        [TextFile("a/../x", "")],
        [TextFile("a//x", "")],
        [TextFile("", "")],
        [TextFile("a\0b", "")],
        [TextFile("a", ""), TextFile("a", "")],
        [TextFile("a", ""), TextFile("a/b", "")],
        [LinkFile("d", "e"), TextFile("d/x", "")],
        [LinkFile("a", "/etc/passwd")],
        [LinkFile("a", "../x")],
        [LinkFile("d/a", "../../x")],
        [LinkFile("d/a", "e/../../x")],
        [PageFile("p", (0, 10), ())],
        [PageFile("p", (10**5, 10), ())],
        [PageFile("p", (50, 50), ((0, 0, "a'b"),))],
        [PageFile("p", (50, 50), ((0, 0, " a"),))],
        [PageFile("p", (50, 50), ((0, 0, "a   b"),))],
        [PageFile("p", (50, 50), ((-1, 0, "a"),))],
        [PageFile("p", (50, 50), ((44, 0, "a"),))],
        [PageFile("p", (50, 50), ((0, 0, "a"), (10, 5, "b")))],
    ],
)
def test_bad_files_are_refused_before_anything_is_written(tmp_path, files):
    with pytest.raises(ValueError, match=r"\w"):
        build_workspace(tmp_path, [TextFile("first", ""), *files])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script",
    [
        "SELEC 1",
        "ATTACH '{outside}' AS other; CREATE TABLE other.t(a)",
        "COMMIT; VACUUM INTO '{outside}'",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT count(*) FROM c",
    ],
)
def test_scripts_that_fail_or_write_elsewhere_are_refused(tmp_path, script):
    root, outside = tmp_path / "root", tmp_path / "outside.db"
    root.mkdir()
    with pytest.raises(ValueError, match=r"a\.db"):
        build_workspace(root, [SqliteFile("a.db", script.format(outside=outside))])
    assert not outside.exists()


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="empty"):
        build_workspace(tmp_path, FILES)


def test_building_is_fast(tmp_path):
    times = []
    for index in range(20):
        root = tmp_path / str(index)
        root.mkdir()
        start = time.perf_counter()
        build_workspace(root, FILES)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01  # about 1 ms on a quiet machine


@pytest.mark.parametrize("character", VISIBLE)
def test_every_character_reads_back_at_every_offset(character):
    for x in range(CELL_WIDTH):
        for y in range(3):
            size = (x + CELL_WIDTH, y + CELL_HEIGHT)
            (line,) = read_page(draw_page(size, [(x, y, character)]))
            assert line.text == character
            assert x <= line.ink[0] < line.ink[2] <= size[0]
            assert y <= line.ink[1] < line.ink[3] <= size[1]


words = st.text(VISIBLE, min_size=1, max_size=6)
texts = st.lists(words, min_size=1, max_size=3).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), texts), max_size=6))
def test_pages_read_back_exactly(lines):
    placed, y = [], 0
    for x, gap, text in lines:
        placed.append((x, y + gap, text))
        y += gap + CELL_HEIGHT
    page = draw_page((170, 120), placed)
    assert [line.text for line in read_page(page)] == [text for *_, text in placed]


def test_columns_read_as_separate_lines():
    page = draw_page((200, 40), [(2, 3, "left one"), (100, 3, "right"), (60 + 40, 20, "below")])
    assert [line.text for line in read_page(page)] == ["left one", "right", "below"]


def test_what_is_no_glyph_reads_as_unreadable():
    page = draw_page((80, 30), [(0, 0, "ok")])
    page.paste(0, (30, 12, 34, 22))
    assert [line.text for line in read_page(page)] == ["ok", "?"]
