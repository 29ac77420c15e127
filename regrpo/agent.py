"""An agent for one task at a time: zero-verifier inference with typed failures as the trigger."""

from pathlib import Path

from regrpo.environment import LocalEnvironment
from regrpo.modeling import load_model, load_tokenizer
from regrpo.rollout import Trajectory, run, task_start
from regrpo.sampling import LocalPolicy
from regrpo.tasks import Task


class ReGRPOAgent:
    """Runs tasks with a trained model; after a failed call it reflects once and repairs.

    Args:
        model: Hugging Face name or path; any causal LM with a chat template.
        reflect: False retries without reflection.
        temperature: 0 is greedy.
        max_new_tokens: limit of one turn.
        max_steps: tool calls, corrections not counted.
        timeout_s: limit of one tool call.
    """

    def __init__(
        self,
        model: str,
        *,
        reflect: bool = True,
        temperature: float = 0.0,
        max_new_tokens: int = 128,
        max_steps: int = 6,
        timeout_s: float = 2.0,
    ):
        tokenizer = load_tokenizer(model)
        self.policy = LocalPolicy(
            load_model(model).eval(),
            tokenizer,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
        self.reflect = reflect
        self.max_steps = max_steps
        self.timeout_s = timeout_s

    def run(self, question: str, workspace: str | Path) -> Trajectory:
        """Works on a question about the files of a folder, which is only read.

        Returns:
            The trajectory; its ``answer`` is None if the agent did not come to one.

        Raises:
            NotADirectoryError: ``workspace`` is no folder.
        """
        folder = Path(workspace).resolve()
        if not folder.is_dir():
            raise NotADirectoryError(
                f"workspace is {str(workspace)!r}; expected an existing folder"
            )
        task = Task("user", "user", question, "", folder, ())
        with LocalEnvironment(timeout_s=self.timeout_s) as environment:
            return run(
                self.policy,
                environment,
                [task_start(task)],
                reflect=self.reflect,
                whole=True,
                max_steps=self.max_steps,
            )[0]
