"""OCR with RapidOCR, whose models ship in its package; installed with the extra ``tools``."""

from typing import Any

from PIL import Image

from regrpo.errors import RunError


class Reader:
    """Reads text off images. Loading takes seconds.

    Raises:
        RunError: the engine is not installed.
    """

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise RunError(
                f"the local OCR needs RapidOCR ({error}): pip install 'regrpo[tools]', or leave "
                "OCR out of bench.local_tools"
            ) from error
        self._engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def __call__(self, image: Image.Image) -> str:
        """One line a piece of text, ``(x1, y1, x2, y2) text``, as the recorded outputs are."""
        import numpy as np

        found = self._engine(np.asarray(image.convert("RGB"))[..., ::-1])
        if found.boxes is None:
            return ""
        lines = []
        for corners, text in zip(found.boxes, found.txts, strict=True):
            (x1, y1), (x2, y2) = corners.min(0), corners.max(0)
            lines.append(f"({round(x1)}, {round(y1)}, {round(x2)}, {round(y2)}) {text}")
        return "\n".join(lines)
