import sqlite3
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrpo.tool_calls import ToolCall, parse_call
from regrpo.tools import TOOLS, Status, call_tool, signature_text
from regrpo.tools.glyphs import CELL_WIDTH
from regrpo.workspace import LinkFile, PageFile, SqliteFile, TextFile, build_workspace

SCHEMA = 'CREATE TABLE "t" (a, -- moved: amber -> a\n  b)'
FILES = (
    TextFile("notes.txt", "plain\ntext"),
    TextFile("run.log", "INFO ok"),
    TextFile("empty.md", ""),
    TextFile("table.csv", 'x,y\r\n1,"two, three"\r\n'),
    TextFile("torn.csv", 'x,y\n1,"2\n'),
    TextFile("data.json", '{\n "b": [1,\n 2],\n "a": "ä"}'),
    TextFile("torn.json", '{"a": '),
    TextFile("deep.json", "[" * 100_000),
    TextFile("folder/inner/a.txt", "a"),
    LinkFile("amber.csv", "table.csv"),
    LinkFile("up", "folder"),
    SqliteFile("shop.db", f"{SCHEMA}; INSERT INTO t VALUES (1, 'x'), (2.5, NULL), (x'00ff', 'é');"),
    PageFile("page.png", (160, 120), ((4, 10, "total 42"), (30, 60, "date: may"))),
    TextFile("docs/fox.txt", "The quick amber fox\n"),
    TextFile("docs/dog.txt", "A lazy dog, a very lazy dog"),
    TextFile("docs/cat.txt", "A cat"),
    TextFile("docs/see.idx", "hound -> dog\nvixen -> fox\n"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    build_workspace(folder, FILES)
    return folder


@pytest.fixture
def call(root):
    return lambda code: call_tool(root, parse_call(code))


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ('read_file("notes.txt")', "plain\ntext"),
        ('read_file("./run.log")', "INFO ok"),
        ('read_file("table.csv")', "x, y\n1, two, three"),
        ('read_file("data.json")', '{"b": [1, 2], "a": "ä"}'),
        ('read_file("folder//inner/./a.txt")', "a"),
        ('sql("shop.db", "SELECT * FROM t")', "1, x\n2.5, NULL\n00ff, é"),
        ('sql(query="SELECT max(a) + 1 FROM t WHERE b IS NULL", database="shop.db")', "3.5"),
        ('sql("shop.db", "WITH c(x) AS (VALUES (1), (2)) SELECT sum(x) FROM c")', "3"),
        ('sql("shop.db", "SELECT sql FROM sqlite_master")', SCHEMA),
        ('search("LAZY")', "dog: A lazy dog, a very lazy dog"),
        ('search("the cat")', "cat: A cat"),
        ('final_answer("42 é")', "42 é"),
        ('calculator("(1 + 2) * 3 - -4 // 3 % 5")', "6"),
        ('calculator("2 ** 200 + 1")', str(2**200 + 1)),
        ('calculator("0.1 + 0.2")', "0.3"),
        ('calculator("10 / 4 + 6 / 3")', "4.5"),
        (
            'calculator("round(2 / 3, 3) + sum([1, 2]) + max(1, 5) + min((3, 4)) + abs(-2)")',
            "13.667",
        ),
    ],
)
def test_calls_that_succeed(call, code, text):
    observation = call(code)
    assert (observation.text, observation.status) == (text, Status.OK)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ('read_file("torn.csv")', "Error: unexpected end of data"),
        ('read_file("torn.json")', "JSONDecodeError: Expecting value: line 1 column 7 (char 6)"),
        ('read_file("page.png")', "UnicodeDecodeError: 'utf-8' codec can't decode byte 0x89 in po"),
        ('read_file("shop.db")', "UnicodeDecodeError: 'utf-8' codec can't decode byte 0x"),
        ('read_file("deep.json")', "RecursionError: maximum recursion depth exceeded"),
        ('read_file("a\\0b")', "ValueError: "),
        ('read_file("\\ud800")', "UnicodeEncodeError: 'utf-8' codec can't encode"),
        ('sql("notes.txt", "SELECT 1 FROM t")', "DatabaseError: file is not a database"),
        ('sql("shop.db", "SELECT 1; SELECT 2")', ""),
        ('sql("shop.db", "ATTACH \'x.db\' AS x")', "DatabaseError: not authorized"),
        ('sql("shop.db", "PRAGMA table_info(t)")', "DatabaseError: not authorized"),
        ('sql("shop.db", "DELETE FROM t")', "DatabaseError: not authorized"),
        ('sql("shop.db", "DROP TABLE t")', "DatabaseError: not authorized"),
        ('sql("shop.db", "VACUUM INTO \'x.db\'")', ""),
        ('sql("shop.db", "SELECT * FROM t WHERE a = ?")', ""),
        ('sql("shop.db", "SELECT \\ud800")', ""),
        ('read_region("notes.txt", 0, 0, 9, 9)', "UnidentifiedImageError: cannot identify"),
        ('read_region("page.png", 9, 0, 9, 9)', "ValueError: region [9, 0, 9, 9] must have"),
        ('read_region("page.png", 0, 0, 161, 9)', "ValueError: region [0, 0, 161, 9] must"),
        ('calculator("1 / 0")', "ZeroDivisionError: division by zero"),
        ('calculator("1 +")', "SyntaxError: invalid syntax"),
        ('calculator("")', "SyntaxError: invalid syntax"),
        ('calculator("x + 1")', "NameError: name 'x' is not defined"),
        ('calculator("eval(1)")', "NameError: name 'eval' is not defined"),
        ('calculator("().__class__")', "SyntaxError: Attribute is not arithmetic"),
        ('calculator("[1] * 9")', "TypeError: operands must be numbers, got list"),
        ('calculator("[1]")', "TypeError: expected a number, got list"),
        ('calculator("9**9**9")', "OverflowError: integer result has more than 4096 bits"),
        ('calculator("(2**2047)**3")', "OverflowError"),
        ('calculator("round(5, -10**9)")', "ValueError: round to at most 100 digits"),
        ('calculator("(-8) ** 0.5")', "ValueError: math domain error"),
        ('calculator("2.0 ** 9999")', "OverflowError: "),
        ('calculator("10 ** 400 / 3")', "OverflowError: "),
        ('calculator("1\\0")', ""),
        ('calculator("' + "(" * 900 + '")', ""),
        ('calculator("' + "-" * 1900 + '1")', "RecursionError"),
        ('calculator("' + "1+" * 1900 + '1")', "ValueError: expression has 3801 characters"),
        ("foo(1)", "NameError: name 'foo' is not defined; tools: sql, read_file, list_dir, "),
        ('sql("a")', "TypeError: sql() missing a required argument: 'query'"),
        ('sql("a", "b", "c")', "TypeError: sql() too many positional arguments"),
        ('sql("a", query="b", root="/")', "TypeError: sql() got an unexpected keyword"),
        ("read_file(7)", "TypeError: read_file() argument 'path' must be str, not int"),
        ('read_region("page.png", 0, 0, 1, True)', "TypeError: read_region() argument 'y1' must"),
        ('read_region("page.png", 0.0, 0, 1, 1)', "TypeError: read_region() argument 'x0' must"),
    ],
)  # fmt: skip
def test_failures_are_the_real_exceptions(call, code, text):
    observation = call(code)
    assert observation.status is Status.ERROR
    assert observation.text.startswith(text)
    assert observation.text.split(":")[0].isidentifier()


@pytest.mark.parametrize(
    "query",
    ["SELECT amber FROM t", "SELECT 1 FROM amber", "SELEC", "SELECT load_extension('x')",
     "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT count(*) FROM c"],
)  # fmt: skip
def test_operational_errors_show_the_stored_schema(root, query):
    connection = sqlite3.connect(root / "shop.db")
    connection.set_progress_handler(lambda: 1, 10_000_000)
    with pytest.raises(sqlite3.OperationalError) as real:
        connection.execute(query).fetchall()
    connection.close()
    observation = call_tool(root, ToolCall("sql", ("shop.db", query)))
    assert observation.status is Status.ERROR
    first, _, rest = observation.text.partition("\n")
    if "load_extension" not in query:  # forbidden in both, by different means
        assert first == f"OperationalError: {real.value}"
    assert rest == SCHEMA


@pytest.mark.parametrize(
    ("path", "error", "folder"),
    [
        ("nope.txt", "FileNotFoundError: [Errno 2] No such file or directory", "."),
        ("folder/x", "FileNotFoundError: [Errno 2] No such file or directory", "folder"),
        ("x/y/z", "FileNotFoundError: [Errno 2] No such file or directory", "."),
        ("folder", "IsADirectoryError: [Errno 21] Is a directory", "."),
        ("amber.csv", "OSError: [Errno 40] Too many levels of symbolic links", "."),
        ("up/inner", "OSError: [Errno 40] Too many levels of symbolic links", "."),
        ("notes.txt/x", "NotADirectoryError: [Errno 20] Not a directory", "."),
        ("../x", "PermissionError: [Errno 13] Path leaves the workspace", "."),
        ("folder/../../x", "PermissionError: [Errno 13] Path leaves the workspace", "."),
        ("/etc/passwd", "PermissionError: [Errno 13] Path leaves the workspace", "."),
        ("", "FileNotFoundError: [Errno 2] No such file or directory", "."),
        ("n" * 300, "OSError: [Errno 36] File name too long", "."),
    ],
)  # fmt: skip
def test_path_errors_show_the_nearest_folder(root, path, error, folder):
    entries = call_tool(root, ToolCall("list_dir", (folder,)))
    assert entries.status is Status.OK
    for call in (
        ToolCall("read_file", (path,)),
        ToolCall("sql", (path, "SELECT 1")),
        ToolCall("read_region", (path, 0, 0, 1, 1)),
    ):
        observation = call_tool(root, call)
        assert observation.text == f"{error}: {path!r}\n{entries.text}"
        assert observation.status is Status.ERROR


def test_listing_marks_folders_and_links_and_has_no_telling_order(call, tmp_path):
    lines = call("list_dir()").text.split("\n")
    assert len(lines) == len({file.path.split("/")[0] for file in FILES})
    assert {"folder/", "docs/", "notes.txt", "amber.csv -> table.csv", "up -> folder"} <= set(lines)
    assert call('list_dir("folder/inner")').text == "a.txt"
    firsts = set()
    for index in range(40):
        root = tmp_path / str(index)
        root.mkdir()
        build_workspace(root, [TextFile(f"{name}{index}.txt", "") for name in "abcd"])
        text = call_tool(root, ToolCall("list_dir")).text
        assert text == call_tool(root, ToolCall("list_dir")).text
        firsts.add(text[0])
    assert firsts == set("abcd")


def test_empty_results(call, tmp_path):
    for code, text in (
        ('read_file("empty.md")', "(empty file)"),
        ('sql("shop.db", "SELECT a FROM t WHERE a = 9")', "(no rows)"),
        ('search("hound")', "no results for 'hound'\nhound -> dog\nvixen -> fox"),
        ('search("")', "no results for ''\nhound -> dog\nvixen -> fox"),
    ):
        observation = call(code)
        assert (observation.text, observation.status) == (text, Status.EMPTY)
    (tmp_path / "docs").mkdir()
    for tool, arguments, text in (
        ("search", ("a",), "no results for 'a'"),
        ("list_dir", ("docs",), "(empty folder)"),
    ):
        observation = call_tool(tmp_path, ToolCall(tool, arguments))
        assert (observation.text, observation.status) == (text, Status.EMPTY)


def test_search_without_documents_or_with_a_changed_one(root, tmp_path):
    observation = call_tool(tmp_path, ToolCall("search", ("a",)))
    assert observation.text == "FileNotFoundError: [Errno 2] No such file or directory: 'docs'"
    build_workspace(tmp_path, [TextFile("docs/a.txt", "fox"), LinkFile("docs/b.txt", "a.txt")])
    assert call_tool(tmp_path, ToolCall("search", ("fox",))).text == "a: fox"
    (tmp_path / "docs/a.txt").write_text("cat or dog")
    assert call_tool(tmp_path, ToolCall("search", ("dog",))).text == "a: cat or dog"
    assert call_tool(tmp_path, ToolCall("search", ("fox",))).status is Status.EMPTY


def test_search_ranks_as_bm25(tmp_path):
    documents = {"one": "red fox", "two": "red red dog " + "filler " * 20, "three": "blue cat"}
    build_workspace(tmp_path, [TextFile(f"docs/{k}.txt", v) for k, v in documents.items()])

    def best(query):
        return call_tool(tmp_path, ToolCall("search", (query,))).text.split(":")[0]

    assert best("red") == "one"  # the short document, although the long one says it twice
    assert best("red dog") == "two"  # a rare term outweighs a common one
    assert best("red blue") == "three"


def test_regions_are_read_from_the_pixels(call):
    assert call('read_region("page.png", 0, 0, 160, 120)').text == "total 42\ndate: may"
    assert call('read_region("page.png", 0, 0, 160, 40)').text == "total 42"
    empty = call('read_region("page.png", 0, 90, 160, 120)')
    assert empty.status is Status.EMPTY
    first, *layout = empty.text.split("\n")
    assert first == "(empty region)"
    for line in layout:  # what the layout says can be read there
        word, _, box = line.partition(" ")
        text = call(f'read_region("page.png", {box.strip("[]")})').text
        assert text == {"total": "total 42", "date:": "date: may"}[word]


def test_glyphs_cut_by_the_region_are_unreadable(call):
    x = 4 + 2 * CELL_WIDTH  # the first "t" of "total" up to the cell of its second
    assert call(f'read_region("page.png", {x + 3}, 0, 160, 40)').text == "?al 42"
    assert call(f'read_region("page.png", 0, 0, {x + 3}, 40)').text == "to?"
    cut = call('read_region("page.png", 0, 0, 160, 15)').text
    assert cut == "????? ??"


def test_images_that_are_no_pages(tmp_path):
    build_workspace(tmp_path, [PageFile("a.png", (60, 40), ((0, 0, "a"),))])
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:60])
    huge = whole[:16] + struct.pack(">II", 40_000, 40_000) + whole[24:]
    (tmp_path / "huge.png").write_bytes(huge)
    for name in ("torn.png", "huge.png"):
        observation = call_tool(tmp_path, ToolCall("read_region", (name, 0, 0, 5, 5)))
        assert observation.status is Status.ERROR


def test_signatures_hide_the_root():
    assert [signature_text(tool) for tool in TOOLS] == [
        "sql(database: str, query: str)",
        "read_file(path: str)",
        "list_dir(path: str = '.')",
        "read_region(page: str, x0: int, y0: int, x1: int, y1: int)",
        "search(query: str)",
        "calculator(expression: str)",
        "final_answer(answer: str)",
    ]


@settings(max_examples=200, deadline=None)
@given(st.text("0123456789+-*/%.() eE,[]roundmaxsu_j", max_size=30))
def test_any_expression_gives_an_observation(expression):
    observation = call_tool(None, ToolCall("calculator", (expression,)))
    assert observation.text
    assert len(observation.text) < 2000
