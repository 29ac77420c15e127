"""Looking at pages: what the small vision-language model is pretrained on.

A stand-in for what every pretrained vision-language model can do already. Shown a page, it writes
the page down and says where its number stands; shown a part of one, it reads it; told a box, it
repeats it. No task, no tool, no failure and no format of calls is taught.
"""

import random

from transformers import PreTrainedTokenizerBase

from regrpo.image_files import opened, to_png
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
    lines = [
        (text, box_at(y // GRID)) for _, y, text in sorted(page.page.lines, key=lambda a: a[1])
    ]
    written = "\n".join(f"{text} in {list(box)}" for text, box in lines)
    told = str(list(box_at(rng.randrange(2 * ROWS - 1) / 2)))
    return [
        (_turns("Write the page.\n<image_00>", written), [data]),
        (_turns("Where is the number?\n<image_00>", str(list(page.box))), [data]),
        *(
            (_turns("What is written?\n<image_00>", text), [_part(data, box)])
            for text, box in lines
        ),
        (_turns(f"Repeat {told}.", told), []),
    ]


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


def _part(data: bytes, box: Box) -> bytes:
    with opened(data) as page:
        return to_png(page.convert("RGB").crop(box))
