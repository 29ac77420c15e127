"""The images of records: ``image`` maps placeholders to files, as in the official schema."""

from pathlib import Path

from regrpo.image_files import PLACEHOLDER
from regrpo.images import Image, ImageReader
from regrpo.records import Record


class ImageError(ValueError):
    """A record's image that is missing or cannot be read, named."""


def record_images(record: Record, folder: Path, reader: ImageReader | None) -> dict[str, Image]:
    """Images of a record by their placeholders, those that one of its messages names. Other keys
    of ``image`` are no placeholders and show nothing.

    Args:
        folder: of the data file, to which paths are relative.

    Raises:
        ImageError: a file is missing or no image.
        ValueError: ``image`` is no such mapping, or the model sees no images (``reader`` is None).
    """
    files = record.get("image") or {}
    if not isinstance(files, dict) or not all(isinstance(path, str) for path in files.values()):
        raise ValueError(
            f"record {record['id']!r}: image is {files!r:.60}; expected "
            '{"<image_00>": "path relative to the data file", ...}'
        )
    text = "\n".join(m["content"] for m in record["conversations"] if m["role"] != "assistant")
    images = {}
    for name, path in files.items():
        if not PLACEHOLDER.fullmatch(name) or name not in text:
            continue
        if reader is None:
            raise ValueError(
                f"record {record['id']!r} shows {name}, and the model sees no images; expected a "
                "vision-language model"
            )
        try:
            images[name] = reader.read((folder / path).read_bytes(), path)
        except OSError as error:
            raise ImageError(f"image {path}: {error.strerror}") from error
        except ValueError as error:
            raise ImageError(f"image {error}") from error
    return images
