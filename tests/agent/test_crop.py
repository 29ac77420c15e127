"""Pictures as observations: `crop`, their way out of the sandbox, and what counts as the same."""

import io
import os

import pytest
from PIL import Image, ImageDraw

from regrpo.environment import LocalEnvironment
from regrpo.tool_calls import ToolCall, Turn
from regrpo.tools import Observation, Status
from regrpo.tools.crop import crop
from regrpo.workspace import PageFile, build_workspace

LINES = ((14, 1, "oak 482"), (28, 43, "elm 917"))
BOX = (42, 0, 70, 14)  # the number at oak


@pytest.fixture
def folder(tmp_path):
    build_workspace(tmp_path, [PageFile("page.png", (112, 84), LINES)])
    return tmp_path


def opened(observation):
    return Image.open(io.BytesIO(observation.image))


def test_the_pixels_of_a_box(folder):
    seen = crop(folder, "page.png", *BOX)
    assert (seen.text, seen.status) == ("part of page.png", Status.OK)
    with Image.open(folder / "page.png") as page:
        assert opened(seen).tobytes() == page.convert("RGB").crop(BOX).tobytes()


def test_a_box_without_ink(folder):
    seen = crop(folder, "page.png", 42, 14, 70, 28)
    assert seen.status is Status.EMPTY
    assert seen.text == "(no ink in [42, 14, 70, 28] of 112 x 84 pixels)"
    with Image.open(folder / "page.png") as page:
        assert opened(seen).tobytes() == page.convert("RGB").tobytes()  # to look where the ink is


@pytest.mark.parametrize(
    ("box", "edges"),
    [
        ((42, 7, 70, 21), "top"),
        ((42, 0, 70, 7), "bottom"),
        ((45, 0, 70, 14), "left"),
        ((42, 0, 59, 14), "right"),
        ((45, 0, 59, 7), "left and right and bottom"),
    ],
)
def test_a_box_that_cuts_ink(folder, box, edges):
    seen = crop(folder, "page.png", *box)
    assert seen.status is Status.ERROR
    assert seen.text == f"CutError: ink crosses the {edges} of {list(box)} of 112 x 84 pixels"
    assert opened(seen).size == (112, 84)


def test_ink_at_the_very_edge_of_the_page_is_not_cut(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 19, 9), fill="black")
    image.save(tmp_path / "dark.png")
    assert crop(tmp_path, "dark.png", 0, 0, 20, 10).status is Status.OK
    assert crop(tmp_path, "dark.png", 0, 0, 20, 9).status is Status.ERROR


def test_strokes_that_end_at_the_edge_are_not_cut(tmp_path):
    image = Image.new("L", (20, 10), 255)
    ImageDraw.Draw(image).rectangle((2, 2, 5, 5), fill=0)
    image.save(tmp_path / "spot.png")
    assert crop(tmp_path, "spot.png", 2, 2, 6, 6).status is Status.OK
    assert crop(tmp_path, "spot.png", 3, 2, 6, 6).status is Status.ERROR


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("page.png", 0, 0, 113, 14), "ValueError: box [0, 0, 113, 14] must have"),
        (("page.png", 14, 0, 14, 14), "ValueError: box [14, 0, 14, 14] must have"),
        (("page.png", -1, 0, 14, 14), "ValueError: box"),
        (("none.png", *BOX), "FileNotFoundError"),
        (("../page.png", *BOX), "PermissionError"),
        (("link.png", *BOX), "OSError: [Errno 40]"),
        (
            ("text.png", *BOX),
            "UnidentifiedImageError: cannot identify image file 'text.png'",
        ),
        (("huge.png", *BOX), "ValueError: huge.png has 3000 x 2000 pixels"),
    ],
)
def test_what_cannot_be_cropped_is_an_observation(folder, arguments, told):
    (folder / "text.png").write_text("no image")
    os.symlink("page.png", folder / "link.png")
    Image.new("1", (3000, 2000), 1).save(folder / "huge.png")
    seen = crop(folder, *arguments)
    assert seen.status is Status.ERROR
    assert seen.image is None
    assert seen.text.startswith(told)


def test_the_sandbox_gives_pictures(folder):
    turn = Turn(None, "Look.", ToolCall("crop", ("page.png", *BOX))).render()
    with LocalEnvironment() as environment:
        (seen,) = environment.execute([(folder, turn)])
        (built,) = environment.execute([((PageFile("page.png", (112, 84), LINES),), turn)])
    assert seen == built == crop(folder, "page.png", *BOX)


def test_a_picture_of_a_custom_tool_arrives_and_a_large_one_does_not():
    from regrpo.tools.custom import custom_tools

    def picture(count: int) -> Observation:
        """Gives some bytes."""
        return Observation("a picture", Status.OK, bytes(count))

    turns = [Turn(None, "Look.", ToolCall("picture", (n,))).render() for n in (5, 20_000_000)]
    with LocalEnvironment(tools=custom_tools([picture], [])) as environment:
        small, large = environment.execute([((), turn) for turn in turns])
    assert small == Observation("a picture", Status.OK, bytes(5))
    assert large.status is Status.ERROR
    assert large.text == "ValueError: the picture has 20000000 bytes, over 16777216"
    assert large.image is None


def test_the_same_is_what_shows_the_same_ink(folder):
    seen = crop(folder, "page.png", *BOX)
    wider = crop(folder, "page.png", 42, 0, 84, 28)
    other = crop(folder, "page.png", 56, 42, 84, 56)
    assert seen.image != wider.image
    assert seen.identity == wider.identity
    assert seen.identity != other.identity
    assert other.status is Status.OK
    blank = [crop(folder, "page.png", x, 14, x + 14, 28).identity for x in (0, 14)]
    assert blank[0] != blank[1]  # by their texts
    assert Observation("482", Status.OK).identity == "482"
