"""Refinements that join the group: a failed correction is executed, seen, and corrected again.

After "Critique-GRPO: Advancing LLM Reasoning with Natural Language and Numerical Feedback" (arXiv
2506.03106). For a local trajectory ``s, a0, o0, z, a1, o1`` whose correction failed, a refinement
``z', a1'`` is sampled behind o1: the critique is what executing said. It is trained as a correction
of a0, in a context that never saw the critique, and joins the group:

    loss = -A f(pi(token | s, a0, o0, ...)),    f(p) = p / (p + gamma)

with A over trajectories and refinements together. f has no old policy and no clip; its slope
f (1 - f) in log p is greatest at p = gamma, so what is right and unlikely counts most.

Differs: the critique is an observation, not a text of a model; all refinements join, not a choice.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from regrpo.environment import Environment
from regrpo.options.resampling import Group
from regrpo.packing import TRAINED
from regrpo.rollout import Policy, Trajectory, conversation, run
from regrpo.segments import TokenizedTrajectory
from regrpo.tools import Status
from regrpo.trajectory import Start
from regrpo_kernels import Segment


def shaped_slope(log_probs: torch.Tensor, gamma: float) -> torch.Tensor:
    """d f / d log p of f(p) = p / (p + gamma), elementwise: what a REINFORCE gradient is times."""
    f = torch.sigmoid(log_probs - math.log(gamma))
    return f * (1 - f)


def refinable(t: Trajectory) -> bool:
    """Whether a local trajectory ended in a correction that visibly failed."""
    last = t.turns[-1]
    return bool(t.start.expected and last.correction and last.observation.status is not Status.OK)


def _behind_critique(t: Trajectory, *, sees: bool) -> Start:
    """The state behind everything that the trajectory did, its last observation included."""
    messages, images = conversation(t.start, t.turns, sees=sees)
    return replace(t.start, messages=messages, images=images, failed=True)


def _last_turn(tokens: TokenizedTrajectory) -> int:
    """Where the trained tokens of the last turn begin."""
    position = max(i for i, kind in enumerate(tokens.segment_ids) if kind in TRAINED)
    while position > 0 and tokens.segment_ids[position - 1] in TRAINED:
        position -= 1
    return position


def _transplant(t: Trajectory, refined: Trajectory) -> Trajectory:
    """The refined turn in the place of the failed correction; only it is trained."""
    kept, taken = _last_turn(t.tokens), _last_turn(refined.tokens)
    before, after = t.tokens, refined.tokens
    context = int(Segment.CONTEXT)
    kinds = [context if kind in TRAINED else kind for kind in before.segment_ids[:kept]]
    tokens = TokenizedTrajectory(
        before.input_ids[:kept] + after.input_ids[taken:],
        kinds + after.segment_ids[taken:],
        [0.0] * kept + after.log_probs[taken:],
        before.images | after.images,
    )
    turns = [*t.turns[:-1], refined.turns[-1]]
    return replace(refined, start=t.start, tokens=tokens, turns=turns, origin="refinement")


def join_refinements(
    groups: Sequence[Group],
    policy: Policy,
    environment: Environment,
    *,
    attempts: int,
    reflect: bool,
) -> tuple[list[Group], dict[str, float]]:
    """Groups without a success with ``attempts`` refinements of their corrections, and metrics."""
    chosen = []
    for index, group in enumerate(groups):
        failed = [t for t in group if refinable(t)]
        if failed and not any(t.success for t in group):
            chosen += [(index, failed[i % len(failed)]) for i in range(attempts)]
    sees = policy.chat.reader is not None
    starts = [_behind_critique(t, sees=sees) for _, t in chosen]
    refined = run(policy, environment, starts, reflect=reflect, whole=False)
    result = [list(group) for group in groups]
    for (index, t), r in zip(chosen, refined, strict=True):
        result[index].append(_transplant(t, r))
    success = sum(t.success for t in refined) / max(1, len(refined))
    return result, {"refinement/count": len(refined), "refinement/success": success}
