"""Conversation -> tokens with a segment id each.

A conversation is rendered and tokenised once. Segment ids come from character spans of the rendered
text through the tokenizer's offsets, never from tokenising string prefixes, which breaks at BPE
boundaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from regrpo.tool_calls import reflection_span
from regrpo.trajectory import Message
from regrpo_kernels import Segment


@dataclass
class TokenizedTrajectory:
    """One sequence: ``input_ids`` and, per token, the ``Segment`` it belongs to.

    ``log_probs`` are the sampler's, 0.0 on tokens that were not sampled; empty if nothing was.
    """

    input_ids: list[int] = field(default_factory=list)
    segment_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    def extend(
        self, ids: Sequence[int], segment: Segment, log_probs: Sequence[float] | None = None
    ) -> None:
        self.input_ids.extend(ids)
        self.segment_ids.extend([int(segment)] * len(ids))
        self.log_probs.extend([0.0] * len(ids) if log_probs is None else log_probs)

    def copy(self) -> "TokenizedTrajectory":
        return TokenizedTrajectory(
            list(self.input_ids), list(self.segment_ids), list(self.log_probs)
        )

    def count(self, segment: Segment) -> int:
        return self.segment_ids.count(int(segment))


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **kwargs: Any) -> str:
    """The conversation as text, through the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; expected an "
            "instruction-tuned model's tokenizer, or set tokenizer.chat_template"
        )
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)
    assert isinstance(text, str)
    return text


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    trained_turns: Sequence[int] | None = None,
) -> TokenizedTrajectory:
    """Renders and tokenises a conversation and assigns segments.

    Args:
        messages: ``role``/``content`` turns.
        trained_turns: indices into ``messages`` of the assistant turns that are ACTION/REFLECTION;
            the others become CONTEXT. ``None`` takes every assistant turn (the ``clean`` mask).

    The end-of-turn token behind a trained turn belongs to it: a model must learn to stop.

    Raises:
        ValueError: the chat template drops or rewrites a message, so that its span cannot be found.
    """
    text = render(tokenizer, messages)
    kinds = bytearray(len(text))  # Segment.CONTEXT == 0
    specials = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
    cursor, acted = 0, False
    for index, message in enumerate(messages):
        content = message["content"].strip()
        start = text.find(content, cursor)
        if start < 0:
            raise ValueError(
                f"messages[{index}]: the chat template of {tokenizer.name_or_path!r} does not "
                f"reproduce its content {content[:60]!r}; expected it verbatim"
            )
        end = cursor = start + len(content)
        if message["role"] == "assistant":
            acted = True
            if trained_turns is not None and index not in trained_turns:
                continue
            stop = next((s for s in specials if text.startswith(s, end)), "")
            cursor = end + len(stop)
            kinds[start:cursor] = bytes([Segment.ACTION]) * (cursor - start)
            span = reflection_span(content)
            if span is not None:
                a, b = start + span[0], start + span[1]
                kinds[a:b] = bytes([Segment.REFLECTION]) * (b - a)
        elif acted:
            kinds[start:end] = bytes([Segment.OBSERVATION]) * (end - start)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trajectory = TokenizedTrajectory()
    trajectory.input_ids = list(encoded["input_ids"])
    trajectory.segment_ids = [kinds[s] if s < e else 0 for s, e in encoded["offset_mapping"]]
    return trajectory


class ChatFormat:
    """What surrounds the turns of a conversation, read off the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        probe = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
        reply = render(tokenizer, probe)
        follow = render(
            tokenizer, [*probe, {"role": "user", "content": "\0"}], add_generation_prompt=True
        )
        end = tokenizer.eos_token
        stop = reply.find(end, reply.rfind("A") + 1) if end else -1
        if stop < 0 or not follow.startswith(reply[: stop + len(end)]):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} does not close an assistant turn "
                f"with eos_token {end!r}; expected ...A{end}..."
            )
        self._before, self._after = follow[stop + len(end) :].split("\0")
        self.end_id: int = tokenizer.eos_token_id
        self._pieces: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = str(self.tokenizer.decode([token]))
        return self._pieces[token]

    def segment(self, ids: Sequence[int], forced: str = "") -> tuple[str, list[int]]:
        """A sampled turn's text, with what was ``forced`` before it, and each token's segment id.

        A token belongs to the segment in which its first character stands: the reflection block is
        REFLECTION, everything else ACTION.
        """
        pieces = [self._piece(i) for i in ids]
        start, stop = reflection_span(forced + "".join(pieces)) or (0, 0)
        segments, position = [], len(forced)
        for piece in pieces:
            inside = start <= position < stop
            segments.append(int(Segment.REFLECTION if inside else Segment.ACTION))
            position += len(piece)
        return forced + str(self.tokenizer.decode(list(ids), skip_special_tokens=True)), segments

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the assistant speaks."""
        return self.encode(render(self.tokenizer, messages, add_generation_prompt=True))

    def observation(self, content: str) -> list[int]:
        """Tokens from behind an assistant's end-of-turn token to where it speaks again."""
        return self.encode(self._before + content + self._after)
