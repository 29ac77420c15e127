"""The fixed contrastive group: executed candidates, rollout tokens, the official objective."""

import random
from dataclasses import replace

import pytest
import torch
from runs import rl_config

from regrpo.config import CANDIDATES, OptimConfig, RewardConfig, TaskConfig
from regrpo.data_engine.contrast import contrastive_groups
from regrpo.errors import RunError
from regrpo.learner import Learner
from regrpo.offline import Script, offline_trajectories, run_groups
from regrpo.prompts import REFLECTION_OPENER
from regrpo.rl import update
from regrpo.rollout import run
from regrpo.segments import ChatFormat
from regrpo.tools import Status
from regrpo.trainer import Run
from regrpo_kernels import Segment

SUCCEED = {"one_shot", "recovery", "long_recovery", "bare_recovery"}


def offline_config(base, out, **kwargs):
    defaults = {
        "mode": "offline",
        "policy": "reinforce",
        "group_size": 5,
        "tasks": TaskConfig(seed=5),
        "batch_tokens": 4000,
    }
    return rl_config(base, out, **{**defaults, **kwargs})


@pytest.fixture(scope="module")
def groups(demonstrations):
    return contrastive_groups(demonstrations, random.Random(0))


@pytest.fixture(scope="module", params=["small", "llama"])
def executed(request, groups, environment, tokenizer, llama_tokenizer):
    """`(chat, [{candidate: trajectory}])`, with tokens of phrases and with a byte-level BPE."""
    chat = ChatFormat(tokenizer if request.param == "small" else llama_tokenizer)
    trajectories = iter(run_groups(groups, CANDIDATES, chat, environment))
    return chat, [{name: next(trajectories) for name in CANDIDATES} for _ in groups]


def test_the_tools_say_which_candidates_succeed(executed, groups, demonstrations):
    assert len(groups) == sum(bool(d.failures) for d in demonstrations) > 80
    for rows in executed[1]:
        assert {name for name, t in rows.items() if t.success} == SUCCEED
        for name, t in rows.items():
            assert len(t.turns) == (1 if name == "one_shot" else 2)
            first = t.turns[0].observation.status
            assert (first is Status.OK) == (name == "one_shot")
    # A failed recovery may observe something: it is wrong because it is another thing.
    wrong = [rows["failed_recovery"].turns[1].observation for rows in executed[1]]
    assert {o.status for o in wrong} >= {Status.OK, Status.ERROR}


def test_reflections_cost_as_their_names_say(executed):
    for rows in executed[1]:
        counts = {name: t.reflection_tokens for name, t in rows.items()}
        assert counts["one_shot"] == counts["plain_retry"] == counts["bare_recovery"] == 0
        assert 0 < counts["recovery"] < counts["long_recovery"]
        assert counts["failed_recovery"] > 0


def test_tokens_are_those_of_a_rollout(executed, groups):
    """The conversation as text, the opener and the context untrained, every turn closed."""
    chat, done = executed
    for group, rows in zip(groups, done, strict=True):
        for name, t in rows.items():
            ids, kinds = t.tokens.input_ids, t.tokens.segment_ids
            prompt = chat.prompt(group.start.messages)
            assert ids[: len(prompt)] == prompt
            assert set(kinds[: len(prompt)]) == {Segment.CONTEXT}
            assert [turn.render() for turn in group.candidates[name]] == [
                turn.text for turn in t.turns
            ]
            trained = [i for i, k in zip(ids, kinds, strict=True) if k in (1, 3)]
            assert trained.count(chat.end_id) == len(t.turns)
            text = chat.tokenizer.decode(trained, clean_up_tokenization_spaces=False)
            assert REFLECTION_OPENER not in text
            closed = chat.tokenizer.decode([chat.end_id])
            expected = [turn.text.removeprefix(REFLECTION_OPENER) for turn in t.turns]
            assert text == "".join(part + closed for part in expected)
            opener = chat.encode(REFLECTION_OPENER)
            if t.reflection_tokens:
                start = kinds.index(Segment.REFLECTION)
                assert ids[start - len(opener) : start] == opener
                assert kinds[start - len(opener) : start] == [Segment.CONTEXT] * len(opener)


def test_a_script_refuses_tools_that_do_not_repeat_themselves(executed, groups, environment):
    chat, _ = executed
    succeeds = groups[0].candidates["one_shot"]
    with pytest.raises(RunError, match="1 go on, expected 0"):
        run(  # the trajectory goes on behind a failure, the script does not
            Script(chat, [groups[0].candidates["plain_retry"][:1]]),
            environment,
            [groups[0].start],
            reflect=True,
            whole=False,
        )
    (done,) = run(
        Script(chat, [succeeds]), environment, [groups[0].start], reflect=True, whole=False
    )
    assert done.success


def test_an_update_without_a_near_miss_says_so(base, environment, tokenizer, tmp_path):
    tasks = TaskConfig(seed=5, trap_share=0.0, families=("label",))
    config = offline_config(base, tmp_path, states=1, tasks=tasks)
    chat = ChatFormat(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regrpo.data_engine.build.near_misses", lambda step, rng, **kwargs: {})
        with pytest.raises(RunError, match="step 3: none of its 1 tasks has a near-miss"):
            offline_trajectories(config, chat, environment, 3)


class Recorder(Run):
    """A run that keeps the gradient of its update, unclipped."""

    def update(self):
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        return super().update()


@pytest.mark.parametrize(
    ("aggregate", "states", "skip"),
    [("seq-mean-token-sum", 1, True), ("seq-mean-token-mean", 3, False)],
)
def test_the_gradient_is_that_of_the_official_formula(
    aggregate, states, skip, base, environment, tokenizer, model, tmp_path
):
    """-mean_k A_k log pi_k + beta mean_k (log pi_k - log ref_k), of sums or means over tokens."""
    config = offline_config(
        base,
        tmp_path,
        states=states,
        loss_agg_mode=aggregate,
        kl_estimator="k1-constant",
        beta=0.3,
        epochs=1,
        zero_variance="skip" if skip else "keep",
        batch_tokens=900,
        reward=RewardConfig(eta=0.1, clip=0.5),
    )
    trajectories, _ = offline_trajectories(config, ChatFormat(tokenizer), environment, 0)
    learner = Learner(model, config)
    with torch.no_grad():  # away from the reference, which must not matter to the gradient
        for parameter in model.parameters():
            parameter.mul_(1.05)
    with Recorder(tmp_path, config, model, tokenizer, OptimConfig(lr=1e-9), 2) as training:
        metrics = update(training, learner, trajectories)
    assert metrics["kl"] != 0

    exact = model.double()
    rewards = torch.tensor([t.success - 0.1 * t.reflection_tokens / 100 for t in trajectories])
    advantages = rewards.view(-1, 5) - rewards.view(-1, 5).mean(1, keepdim=True)
    advantages = advantages.clamp(-0.5, 0.5).flatten().tolist()
    assert len({round(a, 6) for a in advantages[:5]}) >= 3
    loss = torch.zeros((), dtype=torch.float64)
    for advantage, t in zip(advantages, trajectories, strict=True):
        ids = torch.tensor([t.tokens.input_ids])
        log_probs = exact(input_ids=ids).logits[0, :-1].log_softmax(-1)
        trained = torch.isin(torch.tensor(t.tokens.segment_ids[1:]), torch.tensor([1, 3]))
        picked = log_probs.gather(1, ids[0, 1:, None]).squeeze(1)[trained]
        value = picked.sum() if aggregate == "seq-mean-token-sum" else picked.mean()
        # The reference is a constant: it does not change the gradient of the release's KL.
        loss = loss + (-advantage * value + 0.3 * value) / len(trajectories)
    exact.zero_grad()
    loss.backward()
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(
            training.gradients[name].double(), parameter.grad, rtol=2e-3, atol=2e-5, msg=name
        )
    assert max(p.grad.abs().max() for p in exact.parameters()) > 1e-2


def test_the_constant_gradient_is_not_k1s(base, environment, tokenizer, model, tmp_path):
    """Away from the reference the two KLs pull differently."""
    config = offline_config(base, tmp_path, states=1, beta=0.3, epochs=1)
    trajectories, _ = offline_trajectories(config, ChatFormat(tokenizer), environment, 0)
    gradients = []
    for estimator in ("k1-constant", "k1"):
        chosen = replace(config, kl_estimator=estimator, out=str(tmp_path / estimator))
        learner = Learner(model, chosen)
        with Recorder(chosen.out, chosen, model, tokenizer, OptimConfig(lr=1e-9), 2) as training:
            update(training, learner, trajectories)
        gradients.append(training.gradients)
    name = "lm_head.weight" if "lm_head.weight" in gradients[0] else next(iter(gradients[0]))
    assert not torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-2)


def test_updates_on_a_group_prefer_what_succeeded(base, environment, tokenizer, model, tmp_path):
    config = offline_config(
        base, tmp_path, states=1, beta=0.0, epochs=1, loss_agg_mode="seq-mean-token-mean"
    )
    trajectories, _ = offline_trajectories(config, ChatFormat(tokenizer), environment, 0)
    optim = OptimConfig(lr=1e-3, warmup_steps=0)
    with Run(tmp_path, config, model, tokenizer, optim, 8) as training:
        learner = Learner(model, config)
        losses = [update(training, learner, trajectories)["loss"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
