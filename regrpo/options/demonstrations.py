"""Interleaved SFT: where every trajectory failed, learn from a demonstration.

After "Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest
Questions" (ReLIFT, arXiv 2506.07527). Added to the loss of an update:

    weight * mean over the trained tokens of the demonstrations of -log pi(token)

with one demonstration for every group without a success: the executed Reflection-of-Thought repair
from the same state, of which the last turn is trained.

Differs: ReLIFT collects demonstrations and takes a step of its own when there are enough.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from regrpo.images import ImageReader, read_images
from regrpo.rollout import Trajectory
from regrpo.segments import TokenizedTrajectory, tokenize_conversation
from regrpo.sft import strip_reflections
from regrpo.trajectory import Start


def demonstration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
    *,
    reflect: bool,
    reader: ImageReader | None = None,
) -> TokenizedTrajectory:
    """The demonstration from a state, without its reflection if ``reflect`` is False."""
    messages = [*start.messages, *start.demonstration]
    if not reflect:
        messages = strip_reflections(messages)
    return tokenize_conversation(
        tokenizer,
        messages,
        trained_turns=[len(messages) - 1],
        reader=reader,
        images=read_images(reader, start.images),
    )


def hard_states(trajectories: Sequence[Trajectory], groups: Sequence[int]) -> list[Start]:
    """The state of every group without a success, if it has a demonstration."""
    solved = {g for t, g in zip(trajectories, groups, strict=True) if t.success}
    states = {g: t.start for t, g in zip(trajectories, groups, strict=True) if g not in solved}
    return [start for start in states.values() if start.demonstration]
