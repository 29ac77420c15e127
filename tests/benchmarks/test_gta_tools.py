import io

import pytest
from PIL import Image

from regrpo.image_files import to_png
from regrpo.tool_calls import ToolCall
from regrpo.tools import Status
from regrpo.tools.gta.arithmetic import calculate_text
from regrpo.tools.gta.drawing import add_text, draw_box, open_image
from regrpo.tools.gta.files import EpisodeFiles
from regrpo.tools.gta.specs import CATEGORIES, GTA_TOOLS
from regrpo.tools.gta.toolbox import Toolbox, call_key, recordings

OFFERED = tuple(GTA_TOOLS)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "image").mkdir()
    Image.new("RGB", (200, 100), "white").save(tmp_path / "image/page.png")
    (tmp_path / "image/torn.png").write_bytes((tmp_path / "image/page.png").read_bytes()[:80])
    (tmp_path / "secret.png").write_bytes(b"secret")
    names = ("image/page.png", "image/torn.png", "image/gone.png")
    return EpisodeFiles(tmp_path, names, tmp_path / "made")


def test_the_fourteen_tools_and_their_categories():
    assert len(GTA_TOOLS) == 14
    counts = [sum(t.category == c for t in GTA_TOOLS.values()) for c in CATEGORIES]
    assert counts == [4, 3, 5, 2]
    assert (
        GTA_TOOLS["AddText"]
        .describe()
        .startswith("AddText(image: str, text: str, position: str, color: str = 'red'): ")
    )


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("6 / 3", "2.0"),
        ("13.95*3", "41.849999999999994"),
        ("math.sqrt(16) + sqrt(9)", "7.0"),
        ("round(pi, 2)", "3.14"),
        ("comb(5, 2)", "10"),
        ("factorial(10**9)", "OverflowError: factorial of at most 1000"),
        ("10 ** 10 ** 10", "OverflowError: "),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("math", "NameError: name 'math' is not defined"),
        ("sqrt", "TypeError: sqrt is a function; expected a number"),
        ("__import__('os').getcwd()", "SyntaxError: "),
        ("().__class__", "SyntaxError: "),
        ("[x for x in [1]][0]", "SyntaxError: "),
    ],
)
def test_the_calculator(expression, text):
    assert calculate_text(expression).text.startswith(text)


def test_boxes_and_texts_are_drawn_where_they_belong():
    page = Image.new("RGB", (200, 100), "white")
    box = draw_box(page, "(20, 30, 120, 80)", "jar")
    assert box.getpixel((20, 50)) == (255, 0, 0)
    assert box.getpixel((70, 50)) == (255, 191, 191)
    assert box.getpixel((150, 50)) == (255, 255, 255)
    assert box.crop((20, 15, 120, 29)).getcolors(9999) != [(1400, (255, 255, 255))]

    def ink(position, text="xx"):
        drawn = add_text(page, text, position, "black").convert("L").point(lambda v: 255 - v)
        return drawn.getbbox()

    left, top, _right, bottom = ink("lt")
    assert (left, top) < (20, 20)
    assert ink("rb")[2] > 180
    assert ink("rb")[3] > 80
    x1, _y1, _x2, y2 = ink("(50, 60)")  # the left bottom corner
    assert abs(x1 - 50) <= 2
    assert abs(y2 - 60) <= 3
    assert ink("mm", "a\nb")[3] - ink("mm", "a\nb")[1] > bottom - top
    for position in ("xx", "(1, 2, 3)", "10", "__import__"):
        with pytest.raises(ValueError, match="expected 2 numbers"):
            add_text(page, "x", position, "red")
    with pytest.raises(ValueError, match="unknown color specifier"):
        add_text(page, "x", "mm", "no colour")
    with pytest.raises(ValueError, match="x1 <= x2"):
        draw_box(page, "(5, 5, 1, 9)", None)


def test_images_that_cannot_be_read_are_named():
    big = io.BytesIO()
    Image.new("1", (30_000, 9_000)).save(big, format="PNG")
    torn = to_png(Image.effect_noise((50, 50), 50))[:900]
    for data in (b"", b"no image", torn, big.getvalue()):
        with pytest.raises(ValueError, match=r"'a\.png' is no readable image"):
            open_image(data, "a.png")


def test_local_tools_see_the_files_of_their_episode_and_no_others(files, tmp_path):
    with Toolbox(local=("DrawBox", "AddText", "Calculator")) as toolbox:

        def call(name, **arguments):
            return toolbox.call(ToolCall(name, (), arguments), OFFERED, {}, files)

        drawn = call("DrawBox", image="image/page.png", bbox="1, 2, 30, 40")
        assert (drawn.text, drawn.status) == ("image/generated_1.png", Status.OK)
        again = call("AddText", image=drawn.text, text="hi", position="mm")
        assert again.text == "image/generated_2.png"
        assert Image.open(tmp_path / "made/generated_2.png").size == (200, 100)
        for name in ("secret.png", "../x.png", "/etc/passwd", "image/../secret.png", "image"):
            seen = call("DrawBox", image=name, bbox="1, 2, 3, 4")
            assert seen.text.startswith(f"FileNotFoundError: no file '{name}'; files: image/page")
        assert (
            "is no readable image" in call("DrawBox", image="image/torn.png", bbox="1,2,3,4").text
        )
        assert "no file 'image/gone.png'" in call("DrawBox", image="image/gone.png", bbox="1").text
        assert call("OCR", image="image/page.png").text.startswith("LookupError: no output of this")
        assert call("OCR", picture="x").text.startswith("TypeError: OCR() ")
        assert toolbox.counts == {"local": 9, "not recorded": 1}
    with pytest.raises(ValueError, match="expected some of Calculator, Solver"):
        Toolbox(local=("GoogleSearch",))


def test_recordings_are_found_by_arguments_however_they_are_written():
    known = recordings(
        [
            (ToolCall("TextToBbox", (), {"image": "a", "text": "b", "top1": True}), "first"),
            (ToolCall("TextToBbox", (), {"text": "b", "image": "a"}), "second"),
            (ToolCall("GoogleSearch", ("x", 1)), ""),
        ]
    )
    assert known[call_key(ToolCall("TextToBbox", ("a", "b")))] == "first"
    assert len(known) == 2
    with Toolbox() as toolbox:
        seen = toolbox.call(ToolCall("GoogleSearch", ("x", 1)), OFFERED, known, None)
        assert seen.status is Status.EMPTY
        assert toolbox.call(ToolCall("GoogleSearch", ("x",)), OFFERED, known, None).status is (
            Status.ERROR
        )


def test_text_is_read_off_an_image(files):
    pytest.importorskip("rapidocr", reason="the extra [tools] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra [tools] is not installed")
    page = add_text(Image.new("RGB", (400, 200), "white"), "Total 42.50 EUR", "mm", "black")
    name = files.add(to_png(page))
    with Toolbox(local=("OCR",)) as toolbox:
        seen = toolbox.call(ToolCall("OCR", (name,)), OFFERED, {}, files)
        assert seen.text.endswith(") Total 42.50 EUR")
        blank = files.add(to_png(Image.new("RGB", (50, 50))))
        assert toolbox.call(ToolCall("OCR", (blank,)), OFFERED, {}, files).status is Status.EMPTY
