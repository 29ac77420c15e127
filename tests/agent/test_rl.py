"""The update: what groups without variance add, and what leaving them out changes."""

import copy
import random
from dataclasses import dataclass, field

import pytest
import torch

from regrpo.config import TrainConfig
from regrpo.learner import Learner
from regrpo.rl import update
from regrpo.rollout import Trajectory, TurnRecord, task_start
from regrpo.segments import TokenizedTrajectory
from regrpo.tasks import generate_tasks
from regrpo.tools import Observation, Status
from regrpo_kernels import Segment

START = task_start(generate_tasks(1, seed=0)[0])


@dataclass
class Gradients:
    """Stands for a run: keeps the gradient of each update and changes nothing."""

    model: torch.nn.Module
    device: str = "cpu"
    lr: float = 0.0
    step: int = 0
    seen: list[list[torch.Tensor]] = field(default_factory=list)

    def update(self):
        self.seen.append([p.grad.clone() for p in self.model.parameters()])
        self.model.zero_grad()
        return 0.0


def trajectory(rng, success):
    ids = [rng.randrange(3, 200) for _ in range(rng.randrange(9, 30))]
    kinds = [int(Segment.CONTEXT)] * 4 + [int(Segment.ACTION)] * (len(ids) - 4)
    tokens = TokenizedTrajectory(ids, kinds, [-rng.random() * 3 for _ in ids])
    turn = TurnRecord(0, "", Observation("", Status.OK), False, 0)
    return Trajectory(START, tokens, [turn], success=success)


def gradient(model, outcomes, **kwargs):
    rng = random.Random(4)
    model = copy.deepcopy(model)
    config = TrainConfig(model="", out="", group_size=4, batch_tokens=64, **kwargs)
    learner = Learner(model, config)
    with torch.no_grad():  # away from the reference, so that there is a KL
        for parameter in model.parameters():
            parameter.mul_(1.1)
    run = Gradients(model)
    return run.seen, update(run, learner, [trajectory(rng, bool(s)) for s in outcomes])


@pytest.mark.parametrize("epochs", [1, 2])
def test_groups_without_variance_add_nothing_but_the_kl_term(model, epochs):
    outcomes = [1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    settings = {"beta": 0.0, "epochs": epochs}
    left_out, metrics = gradient(model, outcomes, zero_variance="skip", **settings)
    kept, _ = gradient(model, outcomes, zero_variance="keep", **settings)
    assert len(left_out) == len(kept) == epochs
    assert metrics["groups/with_variance"] == pytest.approx(1 / 3)
    for ours, theirs in zip(left_out[0], kept[0], strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_an_update_without_any_variance_is_the_kl_term(model):
    outcomes = [1, 1, 1, 1, 0, 0, 0, 0]
    (left_out,), _ = gradient(model, outcomes, zero_variance="skip", beta=0.1)
    (kept,), _ = gradient(model, outcomes, zero_variance="keep", beta=0.1)
    for ours, theirs in zip(left_out, kept, strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.abs().max() > 0
