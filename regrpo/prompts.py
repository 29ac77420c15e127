"""What the agent is told, in the layout of the official records."""

import re
from collections.abc import Iterable, Sequence

from regrpo.image_files import placeholder, without_placeholders
from regrpo.tools import TOOLS, VISION_TOOLS, signature_text
from regrpo.tools.custom import CustomTool
from regrpo.trajectory import Message

REFLECTION_OPENER = "Reflection:\n- ErrorType:"

_INSTRUCTIONS = (
    "You are a tool-using agent. Each step write a Thought, then a Code block that calls one tool. "
    "After a failed call, first write a Reflection with ErrorType, Evidence and FixPlan.\nTools:\n"
)


def system_prompt(tools: Iterable[str]) -> str:
    """The system turn, from a line a tool."""
    return _INSTRUCTIONS + "\n".join(tools)


SYSTEM_PROMPT = system_prompt(signature_text(tool) for tool in TOOLS)
VISION_PROMPT = system_prompt(signature_text(tool) for tool in VISION_TOOLS)


def opening(
    question: str, tools: Sequence[CustomTool] = (), images: int | None = None
) -> list[Message]:
    """The turns that open a task.

    Args:
        tools: those beside the built-in ones.
        images: how many are shown with the question, by tools that see; None for those of text.
    """
    built_in = SYSTEM_PROMPT if images is None else VISION_PROMPT
    system = "\n".join([built_in, *(tool.describe() for tool in tools)])
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Task: {question}{shown_images(images or 0)}"},
    ]


def shown_images(count: int) -> str:
    """The lines behind a question that show its images."""
    return "".join(f"\n{placeholder(index)}" for index in range(count))


def observation_turn(step: int, observation: str, image: int | None = None) -> str:
    """The user turn that carries an observation; a failed and a corrected call share their step.

    Args:
        image: number of the image that was observed with it, if any.
    """
    shown = without_placeholders(observation)
    behind = "" if image is None else f"\n{placeholder(image)}"
    return f"[OUTPUT OF STEP {step}] -> Observation:\n{shown}{behind}"


def step_of(content: str) -> int:
    """The step of an ``observation_turn``. Raises ValueError for any other text."""
    found = re.match(r"\[OUTPUT OF STEP (\d+)\] -> Observation:\n", content)
    if found is None:
        raise ValueError(f"got {content!r:.60}; expected the observation of a step")
    return int(found[1])


def thought(tool: str) -> str:
    """The fixed thought of reference turns; what needs thinking goes into the reflection."""
    return "I know the answer." if tool == "final_answer" else f"I will call {tool}."
