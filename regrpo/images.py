"""Images of a conversation as tokens.

A message names an image by a placeholder, ``<image_00>``, ``<image_01>``, ... What the model sees
in its place is the vision markup of the Qwen-VL family, with a token for every merged patch.

In the token ids of this package each of these tokens is the image's *key*, a negative number made
of the file's content. So ids alone say which sequences begin alike (equal images are equal tokens,
other images of the same size are not), and what compares, packs or caches ids knows nothing of
images. ``image_rows`` puts the model's own token in their place, last of all.
"""

import hashlib
import itertools
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from regrpo.image_files import PLACEHOLDER, opened, placeholder


@dataclass(frozen=True, eq=False)
class Image:
    """An image as the model takes it.

    Attributes:
        pixel_values: float32 [P, D], its patches.
        grid: patches over time, height and width; P is their product.
        merge: patches of a token, along height and along width.
        key: negative; equal for equal files.
        token_id: the model's token for each of its merged patches.
    """

    pixel_values: torch.Tensor
    grid: tuple[int, int, int]
    merge: int
    key: int
    token_id: int

    def __len__(self) -> int:
        """Tokens."""
        return self.grid[0] * self.grid[1] * self.grid[2] // self.merge**2


class ImageReader:
    """Makes images of files, for one model.

    Args:
        processor: transformers' image processor of the model (Pillow, no torchvision).
        opening, token, closing: names of the special tokens around an image, and for its patches.
        token_id: id of ``token``.

    Attributes:
        known: by their keys, images that somebody holds.
    """

    def __init__(self, processor: Any, opening: str, token: str, closing: str, token_id: int):
        self.processor = processor
        self.token_id = token_id
        self.known: weakref.WeakValueDictionary[int, Image] = weakref.WeakValueDictionary()
        self._markup = f"{opening}{token}{closing}"

    def read(self, data: bytes, name: str) -> Image:
        """The image of a file's bytes.

        Raises:
            ValueError: they are no image, or one that is too large, named.
        """
        digest = hashlib.blake2b(data, digest_size=8).digest()
        key = -1 - (int.from_bytes(digest, "big") >> 1)
        image = self.known.get(key)
        if image is not None:
            return image
        try:
            with opened(data) as file:
                inputs = self.processor(images=file.convert("RGB"), return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"{name}: {error}; expected an image that Pillow reads") from error
        frames, height, width = inputs["image_grid_thw"][0].tolist()
        image = Image(
            inputs["pixel_values"],
            (frames, height, width),
            self.processor.merge_size,
            key,
            self.token_id,
        )
        self.known[key] = image
        return image

    def marked(self, text: str, images: Mapping[str, Image]) -> tuple[str, list[Image]]:
        """``text`` with one token's markup for every placeholder, and the images in their order."""
        shown: list[Image] = []

        def markup(found: re.Match[str]) -> str:
            if found[0] not in images:
                return found[0]
            shown.append(images[found[0]])
            return self._markup

        return PLACEHOLDER.sub(markup, text), shown


def read_images(
    reader: ImageReader | None, files: Sequence[bytes], first: int = 0
) -> dict[str, Image]:
    """Images of files by their placeholders, whose numbers begin at ``first``.

    Raises:
        ValueError: one is no image, or there is no reader because the model sees none.
    """
    if files and reader is None:
        raise ValueError(
            f"got a task or record that shows {placeholder(first)}, and a model that sees no "
            "images; expected a vision-language model, sampled from in this process"
        )
    named = {placeholder(first + index): data for index, data in enumerate(files)}
    return {} if reader is None else {name: reader.read(data, name) for name, data in named.items()}


def spread(ids: Iterable[int], images: Sequence[Image]) -> list[tuple[int, int]]:
    """(index among ``ids``, id) of every token, once images have all of theirs.

    Args:
        ids: with one token an image.
        images: in the order of these tokens.
    """
    left = iter(images)
    token = images[0].token_id if images else None
    tokens: list[tuple[int, int]] = []
    for index, value in enumerate(ids):
        if value == token:
            image = next(left)
            tokens += [(index, image.key)] * len(image)
        else:
            tokens.append((index, value))
    return tokens


def gathered(ids: Sequence[int], images: Mapping[int, Image]) -> list[int]:
    """The inverse of ``spread``: one of the model's tokens an image, to be shown as text."""
    runs = [(value, len(list(same))) for value, same in itertools.groupby(ids)]
    return [
        images[value].token_id if value < 0 else value
        for value, count in runs
        for _ in range(1 if value < 0 else count)
    ]


def rotary_positions(ids: Sequence[int], images: Mapping[int, Image]) -> np.ndarray:
    """Multimodal rotary positions [3, n] of tokens: time, height and width.

    Text counts on in all three. An image's tokens stand at its beginning plus their place in its
    grid, and what follows begins behind its longer side (Wang et al. 2024, "Qwen2-VL", arXiv
    2409.12191, section 2.1).
    """
    values = np.asarray(ids, dtype=np.int64)
    positions = np.empty((3, len(values)), dtype=np.int64)
    at = start = 0
    while at < len(values):
        image = images[int(values[at])] if values[at] < 0 else None
        if image is None:
            behind = np.flatnonzero(values[at:] < 0)
            stop = at + int(behind[0]) if len(behind) else len(values)
            positions[:, at:stop] = start + np.arange(stop - at)
            start += stop - at
        else:
            frames, height, width = image.grid
            sides = (frames, height // image.merge, width // image.merge)
            stop = at + len(image)
            positions[:, at:stop] = start + np.indices(sides).reshape(3, -1)
            start += max(sides[1:])
        at = stop
    return positions


@dataclass(frozen=True)
class ImageRows:
    """The images among some rows of tokens.

    Attributes:
        pixel_values: float32 [P, D], patches of N different images.
        grid_thw: int64 [N, 3].
        rows: int64 [M], the image tokens among the rows, in their order.
        features: int64 [M], which of the images' merged patches each of them is.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    rows: torch.Tensor
    features: torch.Tensor

    def to(self, device: torch.device | str) -> "ImageRows":
        """The same on a device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


def image_rows(ids: np.ndarray, images: Mapping[int, Image]) -> tuple[np.ndarray, ImageRows | None]:
    """Token ids as the model knows them, and what it sees at its image tokens.

    Args:
        ids: int64, of any shape; images in it are whole.
    """
    flat = ids.reshape(-1)
    where = np.flatnonzero(flat < 0)
    if not len(where):
        return ids, None
    keys = flat[where]
    first = np.ones(len(keys), dtype=bool)  # of an image: behind text or another image
    first[1:] = (where[1:] != where[:-1] + 1) | (keys[1:] != keys[:-1])
    starts = np.flatnonzero(first)
    offsets = np.arange(len(keys)) - starts[np.cumsum(first) - 1]
    found = [images[key] for key in dict.fromkeys(keys.tolist())]
    bounds = np.cumsum([0, *map(len, found)])
    begin = {image.key: bound for image, bound in zip(found, bounds, strict=False)}
    features = np.array([begin[key] for key in keys.tolist()]) + offsets
    shown = ids.copy()
    shown.reshape(-1)[where] = found[0].token_id
    return shown, ImageRows(
        torch.cat([image.pixel_values for image in found]),
        torch.tensor([image.grid for image in found]),
        torch.from_numpy(where),
        torch.from_numpy(features),
    )
