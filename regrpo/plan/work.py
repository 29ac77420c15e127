"""How many tokens one process computes for an update, by what happens to them."""

from dataclasses import dataclass

from regrpo.config import PlanConfig, SFTConfig, TrainConfig
from regrpo.config.checks import require
from regrpo.plan.model import RunConfig


@dataclass(frozen=True)
class Work:
    """An update's share of one process, if every trajectory is as long as it may be.

    A group is a state with its trajectories, which compute its context once; of SFT it is one
    sequence. Lengths are in tokens.

    Attributes:
        groups: of this process.
        size: trajectories of a group.
        context: what a group shares, with the tokens of its images.
        new: what a trajectory adds and is trained on.
        observed: what else a trajectory adds: observations between its turns.
        images, image_tokens: images of a context, and tokens of each.
        pass_tokens: of one forward and backward pass.
        samples: whether new tokens are sampled in this process.
        reference: whether the starting model's log-probs are computed.
        scoring_passes: passes without a gradient in each epoch, beside the reference.
        epochs: passes over the trajectories.
        updates: of the whole run.
    """

    groups: int
    size: int
    context: int
    new: int
    observed: int
    images: int
    image_tokens: int
    pass_tokens: int
    samples: bool
    reference: bool
    scoring_passes: int
    epochs: int
    updates: int

    @property
    def branch(self) -> int:
        """Tokens of a trajectory behind its context."""
        return self.new + self.observed

    @property
    def trajectories(self) -> int:
        """Of all groups."""
        return self.groups * self.size

    @property
    def tokens(self) -> int:
        """Tokens of one pass over everything."""
        return self.groups * self.context + self.trajectories * self.branch

    @property
    def trained(self) -> int:
        """Tokens that reach the head."""
        return self.trajectories * self.new

    @property
    def trained_share(self) -> float:
        """Of the tokens of a pass."""
        return self.trained / self.tokens

    @property
    def context_pairs(self) -> int:
        """Pairs of a token and one that it sees, inside the contexts."""
        return self.groups * self.context * (self.context + 1) // 2

    @property
    def branch_pairs(self) -> int:
        """Pairs of a token behind the context and one that it sees."""
        seen = self.branch * self.context + self.branch * (self.branch + 1) // 2
        return self.trajectories * seen


def work_of(run: RunConfig, plan: PlanConfig) -> Work:
    """The work of a run's update, by one of the plan's processes.

    Raises:
        ValueError: lengths that the run does not allow, or more processes than states.
    """
    context = plan.prompt_tokens + plan.images * plan.image_tokens
    what = f"prompt_tokens={plan.prompt_tokens}"
    if plan.images:
        what += f" and {plan.images} images of {plan.image_tokens}"
    if isinstance(run, SFTConfig):
        return _sft(run, plan, context, what)
    return _rl(run, plan, context, what)


def _sft(run: SFTConfig, plan: PlanConfig, context: int, what: str) -> Work:
    new = run.max_length - context if plan.new_tokens is None else plan.new_tokens
    require(
        new > 0 and context + new <= run.max_length,
        "prompt_tokens" if plan.new_tokens is None else "new_tokens",
        plan.prompt_tokens if plan.new_tokens is None else new,
        f"room for new tokens within max_length={run.max_length} beside {what}",
    )
    share = max(run.batch_tokens // plan.processes, run.max_length)
    groups = max(1, share // (context + new))
    return Work(
        groups=groups,
        size=1,
        context=context,
        new=new,
        observed=0,
        images=plan.images,
        image_tokens=plan.image_tokens,
        pass_tokens=min(run.micro_batch_tokens or share, groups * (context + new)),
        samples=False,
        reference=False,
        scoring_passes=0,
        epochs=1,
        updates=run.steps,
    )


def _rl(run: TrainConfig, plan: PlanConfig, context: int, what: str) -> Work:
    require(
        plan.processes <= run.states,
        "processes",
        plan.processes,
        f"at most one for each of the states={run.states}",
    )
    turns = 2 * (run.max_steps if run.mode == "episodes" else 1)
    limit = turns * run.max_new_tokens
    new = limit if plan.new_tokens is None else plan.new_tokens
    require(new <= limit, "new_tokens", new, f"at most turns * max_new_tokens={limit}")
    observed = (turns - 1) * plan.observation_tokens
    longest = context + new + observed
    require(
        longest <= run.batch_tokens,
        "prompt_tokens",
        plan.prompt_tokens,
        f"{what} and {new + observed} behind them to fit batch_tokens={run.batch_tokens}",
    )
    groups = -(-run.states // plan.processes)
    whole = groups * (context + run.group_size * (new + observed))
    return Work(
        groups=groups,
        size=run.group_size,
        context=context,
        new=new,
        observed=observed,
        images=plan.images,
        image_tokens=plan.image_tokens,
        pass_tokens=min(run.batch_tokens, whole),
        samples=run.mode != "offline" and run.rollout.backend == "local",
        reference=run.beta > 0,
        scoring_passes=int(run.options.clip_target is not None),
        epochs=run.epochs,
        updates=run.steps,
    )
