"""The trajectories of an update: drawn from the policy, or fixed, with all that options add.

Everything here is a function of configuration and step (and of the policy and the replay buffer,
which are in the checkpoint), so a resumed run meets the same states.
"""

import random
from collections.abc import Sequence

from regrpo.advantages import group_ids
from regrpo.confidence import with_confidences
from regrpo.config import TrainConfig
from regrpo.data_engine.build import demonstrate, local_starts
from regrpo.distributed import ALONE, Ranks
from regrpo.environment import Environment
from regrpo.offline import offline_trajectories
from regrpo.options.refinements import join_refinements
from regrpo.options.replay import join_replays
from regrpo.options.resampling import Group, resample
from regrpo.own_states import own_states
from regrpo.rollout import LearningPolicy, Policy, Trajectory, run, task_start
from regrpo.trainer import Run, mean
from regrpo.trajectory import Start


def collect(
    training: Run, policy: LearningPolicy, environment: Environment, config: TrainConfig
) -> tuple[list[Trajectory], list[int], dict[str, float]]:
    """The trajectories of an update, the ids of their groups, side by side, and metrics.

    Of several processes each has its share of the states, with their whole groups.
    """
    options, ranks = config.options, training.ranks
    step = training.step % options.repeat_after if options.repeat_after else training.step
    if config.mode == "offline":
        fixed, metrics = offline_trajectories(config, policy.chat, environment, step, ranks)
        return fixed, group_ids(len(fixed), config.group_size), metrics

    def draw(number: int, count: int | None) -> list[Group]:
        # States behind those of the run's own steps, so no round meets a state again.
        later = number * config.steps + step
        return draw_groups(config, policy, environment, later, count, ranks)[0]

    groups, metrics = draw_groups(config, policy, environment, step, ranks=ranks)
    if config.zero_variance == "resample":
        groups, more = resample(groups, draw, config.resample_rounds)
        metrics |= more
    if options.replay > 0:
        entries = training.extra.setdefault("replay", [])
        groups, more = join_replays(groups, entries, options.replay)
        metrics |= more
    if options.refinements > 0:
        groups, more = join_refinements(
            groups, policy, environment, attempts=options.refinements, reflect=config.reflect
        )
        metrics |= more
    ids = [index for index, group in enumerate(groups) for _ in group]
    return [t for group in groups for t in group], ids, metrics


def sample_starts(config: TrainConfig, environment: Environment, step: int) -> list[Start]:
    """The states of one update: a function of configuration and step, so a resumed run agrees."""
    tasks = config.tasks.generate(config.states, first=step * config.states)
    demonstrations, _ = demonstrate(environment, tasks, seed=config.seed)
    rng = random.Random(f"{config.seed}-{step}")
    starts = local_starts(demonstrations, rng, forced_share=config.forced_share)
    if config.mode == "episodes":
        return [start if start.failed else task_start(start.task) for start in starts]
    return starts


def draw_groups(
    config: TrainConfig,
    policy: LearningPolicy,
    environment: Environment,
    step: int,
    count: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[list[Group], dict[str, float]]:
    """A group of sampled trajectories from each of the first ``count`` of this process's states."""
    # All processes draw the same states, so which there are does not depend on their number.
    starts = sample_starts(config, environment, step)[ranks.rank :: ranks.size][:count]
    metrics: dict[str, float] = {}
    if config.own_states_share > 0:
        starts, metrics = with_own_states(config, policy, environment, starts, step)
    if config.trigger.confidence_margin is not None:
        starts = with_confidences(
            policy.model,
            policy.chat.tokenizer,
            starts,
            temperature=config.temperature,
            batch_tokens=config.batch_tokens,
            reader=policy.chat.reader,
        )
    size, whole = config.group_size, config.mode == "episodes"
    trajectories = run(
        policy,
        environment,
        [start for start in starts for _ in range(size)],
        reflect=config.reflect,
        whole=whole,
        max_steps=config.max_steps,
        trigger=config.trigger,
    )
    if whole:
        metrics |= episode_metrics(trajectories)
    return [trajectories[i : i + size] for i in range(0, len(trajectories), size)], metrics


def with_own_states(
    config: TrainConfig,
    policy: Policy,
    environment: Environment,
    starts: list[Start],
    step: int,
) -> tuple[list[Start], dict[str, float]]:
    """Replaces states that are not forced by states of the policy's own, and counts."""
    rng = random.Random(f"{config.seed}-{step}-own")
    share = config.own_states_share / (1 - config.forced_share)
    chosen = [i for i, s in enumerate(starts) if not s.failed and rng.random() < share]
    own = own_states(
        policy,
        environment,
        [starts[i] for i in chosen],
        rng,
        reflect=config.reflect,
        max_steps=config.max_steps,
        trigger=config.trigger,
    )
    replaced = dict(zip(chosen, own.starts, strict=True))
    return [replaced.get(i, start) for i, start in enumerate(starts)], {
        "states/own": len(chosen) / len(starts),
        "states/own_failed": mean(start.failed for start in own.starts),
        "states/own_off_track": own.off_track / max(1, own.turns),
    }


def episode_metrics(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """How long the episodes were, how often they answered and reflected."""
    reflections = [sum(turn.reflection_tokens > 0 for turn in t.turns) for t in episodes]
    return {
        "episode/turns": mean(len(t.turns) for t in episodes),
        "episode/answered": mean(t.answer is not None for t in episodes),
        "episode/reflections": mean(reflections),
    }
