"""The offline mode: fixed candidates, executed as a rollout executes what a policy writes.

A script stands where the policy does. So the tokens are those of a rollout (chat format, segments,
the opener that the trigger writes and that is not trained), and success is what the tools say.
"""

import random
from collections.abc import Sequence

from regrpo.config import TrainConfig
from regrpo.data_engine.build import demonstrate
from regrpo.data_engine.contrast import Group, contrastive_groups
from regrpo.distributed import ALONE, Ranks
from regrpo.environment import Environment
from regrpo.errors import RunError
from regrpo.prompts import REFLECTION_OPENER
from regrpo.rollout import Trajectory, run
from regrpo.sampling import Sample
from regrpo.segments import ChatFormat
from regrpo.tool_calls import Turn
from regrpo.trainer import mean


class Script:
    """A policy of ``regrpo.rollout`` that writes given turns, one script a trajectory.

    A script is as long as its trajectory: every turn of it but the last fails. Log-probs are zeros:
    nothing was sampled.
    """

    def __init__(self, chat: ChatFormat, scripts: Sequence[Sequence[Turn]]):
        self.chat = chat
        self._scripts = scripts
        self._round = 0

    def session(self) -> "Script":
        """Itself: its scripts are those of one rollout."""
        return self

    def generate(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Sample]:
        """The next turn of every script that is not at its end.

        Raises:
            RunError: other trajectories go on: a call did not do what it did before.
        """
        turns = [script[self._round] for script in self._scripts if len(script) > self._round]
        self._round += 1
        if len(turns) != len(prompts):
            raise RunError(
                f"turn {self._round} of the candidates: {len(prompts)} go on, expected "
                f"{len(turns)}; the tools did not repeat what they observed before"
            )
        samples = []
        for turn in turns:
            text = turn.render()
            if turn.reflection is not None:  # the trigger has written the opener
                text = text.removeprefix(REFLECTION_OPENER)
            ids = [*self.chat.encode(text), self.chat.end_id]
            samples.append(Sample(ids, [0.0] * len(ids)))
        return samples


def run_groups(
    groups: Sequence[Group], names: Sequence[str], chat: ChatFormat, environment: Environment
) -> list[Trajectory]:
    """Executes the named candidates of every group; those of a group are consecutive."""
    done: dict[tuple[int, str], Trajectory] = {}
    for reflect in (True, False):
        rows = [
            (i, name)
            for i in range(len(groups))
            for name in names
            if (name not in ("plain_retry", "bare_recovery")) == reflect
        ]
        policy = Script(chat, [groups[i].candidates[name] for i, name in rows])
        starts = [groups[i].start for i, _ in rows]
        trajectories = run(policy, environment, starts, reflect=reflect, whole=False)
        done.update(zip(rows, trajectories, strict=True))
    return [done[i, name] for i in range(len(groups)) for name in names]


def offline_trajectories(
    config: TrainConfig,
    chat: ChatFormat,
    environment: Environment,
    step: int,
    ranks: Ranks = ALONE,
) -> tuple[list[Trajectory], dict[str, float]]:
    """The candidates of one update, a function of configuration and step, and metrics of them.

    Of several processes each executes its share of the groups, which may be none.

    Raises:
        RunError: no task of the update has a near-miss.
    """
    tasks = config.tasks.generate(config.states, first=step * config.states)
    demonstrations, _ = demonstrate(environment, tasks, seed=config.seed)
    groups = contrastive_groups(demonstrations, random.Random(f"{config.seed}-{step}"))
    if not groups:
        raise RunError(
            f"step {step}: none of its {config.states} tasks has a near-miss to contrast with; "
            "expected one, choose more states"
        )
    names = config.candidates
    without = len(demonstrations) - len(groups)
    groups = groups[ranks.rank :: ranks.size]
    trajectories = run_groups(groups, names, chat, environment)
    metrics = {
        f"success/{name}": mean(t.success for t in trajectories[k :: len(names)])
        for k, name in enumerate(names)
    }
    metrics["states/without_near_miss"] = float(without if ranks.main else 0)
    return trajectories, metrics
