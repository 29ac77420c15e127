"""An agent for one task at a time: inference with a deterministic trigger and no verifier."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regrpo.config import RunConfig, TriggerConfig
from regrpo.environment import LocalEnvironment, Workspace
from regrpo.modeling import base_model, load_image_reader, load_model, load_tokenizer
from regrpo.prompts import opening
from regrpo.rollout import Trajectory, TurnRecord, run
from regrpo.sampling import LocalPolicy
from regrpo.tasks import Task, task_images
from regrpo.tools import TOOLS
from regrpo.tools.custom import custom_tools
from regrpo.tools.shipping import ship
from regrpo.trajectory import Start

Function = Callable[..., Any]


class ReGRPOAgent:
    """Runs whole tasks with any Hugging Face causal LM that has a chat template.

    When the trigger fires (`regrpo.trigger`) it reflects once and calls again. An episode ends with
    an answer, with a correction of a failed call that fails as well, after ``max_steps`` steps, or
    when the model's context is full; a turn ends after ``max_new_tokens`` at the latest.

    Args:
        model: Hugging Face name, a folder that holds a model, or one that holds a LoRA adapter.
        tools: further Python functions (`regrpo.tools.custom` says which), run in the sandbox,
            within its limits. It keeps accidents small and is no wall against malice.
        local_tools: functions that run in this process instead, without any limit: for what needs
            the network, writes, or holds a connection.
        reflect: False retries without reflection.
        trigger: what opens a reflection beside a typed failure; None for nothing else.
        temperature: 0 is greedy.
        max_new_tokens: limit of one turn.
        max_steps: tool calls, corrections not counted.
        timeout_s: limit of one tool call in the sandbox, in seconds.
        memory_mb: address space of the sandbox, in MiB.
        device: such as "cpu" or "cuda:1"; None for the GPU where there is one.
        dtype: "auto" (as the weights are saved), "float32", "bfloat16" or "float16".
        seed: of sampling.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: the model cannot be loaded or run, or a
            value is out of range. TypeError: a tool is no plain function with typed parameters.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tools: Sequence[Function] = (),
        local_tools: Sequence[Function] = (),
        reflect: bool = True,
        trigger: TriggerConfig | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        max_steps: int = 6,
        timeout_s: float = 2.0,
        memory_mb: int = 1024,
        device: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
    ):
        self.config = RunConfig(
            task="",
            model=str(model),
            reflect=reflect,
            trigger=TriggerConfig() if trigger is None else trigger,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            max_steps=max_steps,
            timeout_s=timeout_s,
            device=device,
            dtype=dtype,
            seed=seed,
        )
        self.memory_mb = memory_mb
        names = [tool.__name__ for tool in TOOLS]
        self.tools = custom_tools(tools, names)
        self.local_tools = custom_tools(local_tools, [*names, *(t.name for t in self.tools)])
        ship(self.tools)  # what cannot go to the sandbox is said before the model is loaded
        tokenizer = load_tokenizer(self.config.model)
        loaded = load_model(self.config.model, dtype=dtype, device=device, trainable=False).eval()
        inner = base_model(loaded)
        # Chat models know several ends of a text; the template's own is the chat format's.
        ends = inner.generation_config.eos_token_id if inner.generation_config else None
        self.policy = LocalPolicy(
            loaded,
            tokenizer,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
            max_length=getattr(inner.config.get_text_config(), "max_position_embeddings", None),
            reader=load_image_reader(self.config.model, tokenizer),
        )

    def run(
        self,
        question: str,
        workspace: str | Path | None = None,
        on_turn: Callable[[TurnRecord], object] | None = None,
        images: Sequence[str] | None = None,
    ) -> Trajectory:
        """Works on a question, about the files of a folder.

        Args:
            workspace: the folder, which tools only read; None for an empty one.
            on_turn: called with every turn as soon as its observation is there.
            images: paths in ``workspace``, shown with the question to a vision-language model. The
                built-in tools are then `regrpo.tools.VISION_TOOLS`, with no image as well; None
                for those of text.

        Returns:
            The trajectory; its ``answer`` is None if the agent did not come to one, and ``end``
            says why it ended.

        Raises:
            NotADirectoryError: ``workspace`` is no folder.
            ValueError: an image is missing or unreadable, or the model sees none.
        """
        files: Workspace = () if workspace is None else existing_folder(workspace)
        shown = None if images is None else tuple(images)
        task = Task("user", "user", question, "", files, (), shown)
        messages = opening(question, [*self.tools, *self.local_tools], task.num_images)
        start = Start(task, tuple(messages), images=task_images(task))
        config = self.config
        with LocalEnvironment(
            timeout_s=config.timeout_s,
            memory_mb=self.memory_mb,
            tools=self.tools,
            local_tools=self.local_tools,
        ) as environment:
            return run(
                self.policy,
                environment,
                [start],
                reflect=config.reflect,
                whole=True,
                max_steps=config.max_steps,
                trigger=config.trigger,
                max_length=self.policy.max_length,
                on_turn=None if on_turn is None else lambda t: on_turn(t.turns[-1]),
            )[0]


def existing_folder(path: str | Path) -> Path:
    """Its absolute path. Raises NotADirectoryError for anything else."""
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"workspace is {str(path)!r}; expected an existing folder")
    return folder
