"""Looking at pages: what the small vision-language model is pretrained on.

A stand-in for what every pretrained vision-language model can do already. Shown a page, it writes
the page down, says where a label's number stands, and what it is; shown a part of one, it reads it;
told a box, it repeats it. No task, no tool, no failure and no format of calls is taught.
"""

import io
import random
from collections.abc import Mapping, Sequence

from PIL import Image
from transformers import PreTrainedTokenizerBase

from regrpo.images import ImageReader, read_images
from regrpo.segments import TokenizedTrajectory, tokenize_conversation
from regrpo.tools.glyphs import Box
from regrpo.trajectory import Message
from regrpo.vision_tasks import GRID, ROWS, box_at, scan
from regrpo.workspace import read_image

Look = tuple[list[Message], list[bytes]]


def look(rng: random.Random) -> list[Look]:
    """Some conversations about one page, each with the images that it shows."""
    page = scan(rng, "page.png", trap=False)
    data = read_image((page.page,), page.page.path)
    assert data is not None
    lines = {
        text.split()[0]: (text.split()[1], box_at(y // GRID)) for _, y, text in page.page.lines
    }
    value, box = rng.choice(list(lines.values()))
    told = str(list(box_at(rng.randrange(ROWS))))
    downwards = sorted(lines, key=lambda label: lines[label][1][1])
    looks = [
        (_turns("Write the page.\n<image_00>", _written(downwards, lines)), [data]),
        (_turns("What is written?\n<image_00>", value), [_part(data, box)]),
        (_turns(f"Repeat {told}.", told), []),
    ]
    asked = rng.sample(list(lines), len(lines))
    question = f"Write {', '.join(asked)}.\n<image_00>"
    looks.append((_turns(question, _written(asked, lines)), [data]))
    for label in asked[:2]:
        question = f"Where is the number at {label}?\n<image_00>"
        looks.append((_turns(question, str(list(lines[label][1]))), [data]))
    return looks


def tokenized(
    looks: list[Look], tokenizer: PreTrainedTokenizerBase, reader: ImageReader
) -> list[TokenizedTrajectory]:
    """The conversations as the model takes them; the answers are trained."""
    return [
        tokenize_conversation(tokenizer, messages, reader=reader, images=read_images(reader, files))
        for messages, files in looks
    ]


def _turns(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _written(labels: Sequence[str], lines: Mapping[str, tuple[str, Box]]) -> str:
    return "\n".join(f"{label} {lines[label][0]} in {list(lines[label][1])}" for label in labels)


def _part(data: bytes, box: Box) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as page:
        page.convert("RGB").crop(box).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
