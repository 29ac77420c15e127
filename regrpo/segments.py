"""Conversation -> tokens with a segment id each.

A conversation is rendered and tokenised once. Segment ids come from character spans of the rendered
text through the tokenizer's offsets, never from tokenising string prefixes, which breaks at BPE
boundaries.

What a message says is text only: the name of a special token in it (``<|end|>`` in a file that was
read, say) is broken by a zero-width space before the template is applied, so no content can end
its turn or open another. Other text is left as it is.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from regrpo.images import Image, ImageReader, spread
from regrpo.tool_calls import reflection_span
from regrpo.trajectory import Message
from regrpo_kernels import Segment


@dataclass
class TokenizedTrajectory:
    """One sequence: ``input_ids`` and, per token, the ``Segment`` it belongs to.

    ``log_probs`` are the sampler's, 0.0 on tokens that were not sampled; empty if nothing was.
    An image's tokens are its key, by which ``images`` has it (`regrpo.images`).
    """

    input_ids: list[int] = field(default_factory=list)
    segment_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    images: dict[int, Image] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    def extend(
        self,
        ids: Sequence[int],
        segment: Segment,
        log_probs: Sequence[float] | None = None,
        images: Sequence[Image] = (),
    ) -> None:
        """Appends tokens of one segment; without ``log_probs`` they were not sampled. ``images``
        are those among them."""
        self.images.update((image.key, image) for image in images)
        self.input_ids.extend(ids)
        self.segment_ids.extend([int(segment)] * len(ids))
        self.log_probs.extend([0.0] * len(ids) if log_probs is None else log_probs)

    def count(self, segment: Segment) -> int:
        """How many tokens belong to a segment."""
        return self.segment_ids.count(int(segment))


@functools.lru_cache(maxsize=8)
def _special_names(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str] | None:
    """Matches where the name of a special token begins; ``size`` tells of tokens added since."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    names = "|".join(re.escape(name) for name in special if len(name) > 1)
    return re.compile(f"(?=(?:{names}))(.)", re.DOTALL) if names else None


def inert(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    """``content`` with a zero-width space behind the first character of every special token's name.

    The tokenizer reads what is left as ordinary text. Overlapping names are all broken; a name of
    one character cannot be.
    """
    names = _special_names(tokenizer, len(tokenizer))
    return names.sub("\\1\u200b", content) if names else content


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **kwargs: Any) -> str:
    """The conversation as text, through the tokenizer's chat template; contents are ``inert``."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; expected an "
            "instruction-tuned model's tokenizer, or set tokenizer.chat_template"
        )
    shown = [{**m, "content": inert(tokenizer, m["content"])} for m in messages]
    text = tokenizer.apply_chat_template(shown, tokenize=False, **kwargs)
    assert isinstance(text, str)
    return text


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **kwargs: Any
) -> tuple[list[str], list[str]]:
    """What the chat template puts around the contents ``[n + 1]``, and the contents ``[n]``.

    Contents come as the template shows them: ``inert``, and perhaps trimmed. They are placed by
    rendering marks in their stead: looking for a content would find the word ``user`` in a header.

    Raises:
        ValueError: the chat template drops, reorders or rewrites a message.
    """
    # A template that trims takes the vertical tabs away.
    marks = [{**m, "content": f"\v\0{i}\0\v"} for i, m in enumerate(messages)]
    parts = re.split("(\v?)\0(\\d+)\0(\v?)", render(tokenizer, marks, **kwargs))
    frames, contents = parts[::4], []
    text = render(tokenizer, messages, **kwargs)
    position = 0
    for index, message in enumerate(messages):
        left, found, right = parts[4 * index + 1 : 4 * index + 4] or ("", "", "")
        content = inert(tokenizer, message["content"])
        content = content if left else content.lstrip()
        content = content if right else content.rstrip()
        contents.append(content)
        position += len(frames[index]) if found else 0
        if found != str(index) or not text.startswith(content, position):
            raise ValueError(
                f"messages[{index}]: the chat template of {tokenizer.name_or_path!r} does not "
                f"reproduce its content {content[:60]!r}; expected it verbatim"
            )
        position += len(content)
    shown = [piece for pair in zip(frames, [*contents, ""], strict=False) for piece in pair]
    if len(frames) != len(contents) + 1 or "".join(shown) != text:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} repeats a message or depends on its "
            "content; expected each message once"
        )
    return frames, contents


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, frame: str) -> str:
    """The special token that closes an assistant turn, and white space before it.

    Raises:
        ValueError: none does, so that a model could not learn to stop.
    """
    special = sorted(
        (t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len
    )
    gap = len(frame) - len(frame.lstrip())
    for token in reversed(special):
        if frame.startswith(token, gap):
            return frame[: gap + len(token)]
    raise ValueError(
        f"the chat template of {tokenizer.name_or_path!r} does not close an assistant turn with a "
        f"special token; it goes on with {frame[:40]!r}"
    )


@functools.lru_cache(maxsize=8)
def _takes_system(tokenizer: PreTrainedTokenizerBase, template: str | None) -> bool:
    """Whether a system turn is shown where it stands: Gemma refuses it, Mistral moves it."""
    roles = ("system", "user", "assistant", "user")
    try:
        _rendered(tokenizer, [{"role": role, "content": "A"} for role in roles])
    except (TemplateError, ValueError):
        return False
    return True


def fold_system(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """The messages as the chat template can show them: a system turn it refuses opens the first
    user turn."""
    if messages[0]["role"] != "system" or _takes_system(tokenizer, tokenizer.chat_template):
        return list(messages)
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    trained_turns: Sequence[int] | None = None,
    reader: ImageReader | None = None,
    images: Mapping[str, Image] | None = None,
) -> TokenizedTrajectory:
    """Renders and tokenises a conversation and assigns segments.

    Args:
        messages: ``role``/``content`` turns.
        trained_turns: indices into ``messages`` of the assistant turns that are ACTION/REFLECTION;
            the others become CONTEXT. ``None`` takes every assistant turn (the ``clean`` mask).
        reader: of the model's images; None for a model that sees none.
        images: by their placeholders, in turns that are not the assistant's: what a model writes
            is text.

    The end-of-turn token behind a trained turn belongs to it: a model must learn to stop.

    Raises:
        ValueError: the chat template drops or rewrites a message, so that its span cannot be found,
            or does not close assistant turns.
    """
    folded = fold_system(tokenizer, messages)
    if len(folded) < len(messages) and trained_turns is not None:
        trained_turns = [index - 1 for index in trained_turns]
    messages = folded
    frames, contents = _rendered(tokenizer, messages)
    text = frames[0]
    kinds = bytearray(len(text))  # Segment.CONTEXT == 0
    closings: dict[str, int] = {}
    acted = False
    shown: list[Image] = []
    for index, (message, content) in enumerate(zip(messages, contents, strict=True)):
        frame = frames[index + 1]
        body, tail = bytearray(len(content)), bytearray(len(frame))
        if message["role"] == "assistant":
            acted = True
            if trained_turns is None or index in trained_turns:
                body = bytearray([Segment.ACTION]) * len(content)
                start, stop = reflection_span(content) or (0, 0)
                body[start:stop] = bytes([Segment.REFLECTION]) * (stop - start)
                if frame not in closings:
                    closings[frame] = len(_end_of_turn(tokenizer, frame))
                tail[: closings[frame]] = bytes([Segment.ACTION]) * closings[frame]
        else:
            if reader is not None and images:
                content, more = reader.marked(content, images)
                shown += more
            body = bytearray([Segment.OBSERVATION if acted else 0]) * len(content)
        text += content + frame
        kinds += body + tail
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    segments = [kinds[s] if s < e else 0 for s, e in encoded["offset_mapping"]]
    tokens = spread(encoded["input_ids"], shown)
    return TokenizedTrajectory(
        input_ids=[value for _, value in tokens],
        segment_ids=[segments[index] for index, _ in tokens],
        images={image.key: image for image in shown},
    )


class ChatFormat:
    """What surrounds the turns of a conversation, read off the tokenizer's chat template.

    Args:
        reader: of the model's images; None for a model that sees none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reader: ImageReader | None = None):
        self.tokenizer = tokenizer
        self.reader = reader
        probe = [{"role": role, "content": " A "} for role in ("user", "assistant", "user")]
        frames, contents = _rendered(tokenizer, probe, add_generation_prompt=True)
        closing = _end_of_turn(tokenizer, frames[2])
        self.end_id = tokenizer.get_vocab()[closing.lstrip()]
        self._before, self._after = frames[2][len(closing) :], frames[3]
        self._trims = contents[2] == "A"
        self._pieces: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """The text's tokens, without any that the tokenizer adds by itself."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def segment(self, ids: Sequence[int], forced: str = "") -> tuple[str, list[int]]:
        """A sampled turn's text, with what was ``forced`` before it, and each token's segment id.

        The text is all that was sampled but the end-of-turn token. A token belongs to the segment
        in which its first character stands: the reflection block is REFLECTION, everything else
        ACTION.
        """
        body = ids[:-1] if ids and ids[-1] == self.end_id else ids
        for token in body:
            if token not in self._pieces:
                self._pieces[token] = self._decode([token])
        pieces = [self._pieces[token] for token in body]
        start, stop = reflection_span(forced + "".join(pieces)) or (0, 0)
        segments, position = [], len(forced)
        for piece in pieces:
            inside = start <= position < stop
            segments.append(int(Segment.REFLECTION if inside else Segment.ACTION))
            position += len(piece)
        segments += [int(Segment.ACTION)] * (len(ids) - len(body))
        return forced + self._decode(body), segments

    def _spread(self, text: str, shown: Sequence[Image]) -> list[int]:
        return [value for _, value in spread(self.encode(text), shown)]

    def prompt(
        self, messages: Sequence[Message], images: Mapping[str, Image] | None = None
    ) -> list[int]:
        """Tokens up to where the assistant speaks; see ``tokenize_conversation`` for images."""
        messages = fold_system(self.tokenizer, messages)
        if self.reader is None or not images:
            return self.encode(render(self.tokenizer, messages, add_generation_prompt=True))
        frames, contents = _rendered(self.tokenizer, messages, add_generation_prompt=True)
        text, shown = frames[0], []
        for message, content, frame in zip(messages, contents, frames[1:], strict=True):
            if message["role"] != "assistant":
                content, more = self.reader.marked(content, images)
                shown += more
            text += content + frame
        return self._spread(text, shown)

    def observation(self, content: str, images: Mapping[str, Image] | None = None) -> list[int]:
        """Tokens from behind an assistant's end-of-turn token to where it speaks again."""
        shown = inert(self.tokenizer, content.strip() if self._trims else content)
        seen: list[Image] = []
        if self.reader is not None and images:
            shown, seen = self.reader.marked(shown, images)
        return self._spread(self._before + shown + self._after, seen)
