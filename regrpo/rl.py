"""ReGRPO (arXiv 2606.31392): on local trajectories, on whole episodes, or on fixed candidates.

An update: for every state, K trajectories are collected and executed; success minus reflection cost
is compared inside the group of K; reflections and actions are trained together. By ``mode``:

- ``local``: ``a0 -> o0 -> z -> a1 -> o1`` is sampled from the policy, with clipped ratios against
  it. States are those of data, some behind a near-miss that was executed already, some from
  episodes of the policy's own.
- ``episodes``: whole tasks are sampled; the final answer is the success, all reflections cost.
- ``offline``: as the official release does, nothing is sampled (``regrpo.offline``).

With ``reflect=False`` the same loop is GRPO with plain retries.

Deviations from the official release: it samples nothing and clips nothing; here, but offline, old
log-probs come from the sampler, and the reference is the model before the run (of a new adapter:
the adapter off).
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from regrpo.advantages import advantages_of, choose, group_ids
from regrpo.collect import collect
from regrpo.config import TrainConfig
from regrpo.environment import Environment
from regrpo.errors import RunError
from regrpo.losses import packed_log_probs, policy_loss
from regrpo.modeling import (
    CausalLM,
    head,
    hidden_states,
    load_model,
    load_tokenizer,
    logit_softcap,
)
from regrpo.options.clip_bounds import adaptive_bounds
from regrpo.options.demonstrations import demonstration_tokens, hard_states
from regrpo.options.refinements import shaped_slope
from regrpo.packing import PackedBatch, best_fit_decreasing, collate, pack_groups
from regrpo.progress import live_line
from regrpo.rollout import LearningPolicy, Trajectory
from regrpo.sampling import LocalPolicy
from regrpo.segments import TokenizedTrajectory
from regrpo.served_adapter import ServedLearner
from regrpo.sft import NLL
from regrpo.trainer import Run, mean
from regrpo.trajectory_log import TrajectoryLog
from regrpo_kernels import Objective, ReflectionAdvantages

WATCHED = ("reward/mean", "success", "recovery", "reflection/rate")


def rollout_metrics(
    trajectories: Sequence[Trajectory], result: ReflectionAdvantages, groups: Sequence[int]
) -> dict[str, float]:
    """What the sampled trajectories of an update did; without what joined their groups."""
    own = [i for i, t in enumerate(trajectories) if t.origin == "policy"]
    sampled = [trajectories[i] for i in own]
    corrected = [t for t in sampled if any(turn.correction for turn in t.turns)]
    free = [t for t in sampled if not t.start.failed]
    outcomes: dict[int, set[bool]] = {}
    for i in own:
        outcomes.setdefault(groups[i], set()).add(trajectories[i].success)
    rewards = result.rewards[own]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item(),
        "success": mean(t.success for t in sampled),
        "success/first_try": mean(
            t.success and not any(turn.correction for turn in t.turns) for t in free
        ),
        "recovery": mean(t.success for t in corrected),
        "reflection/rate": mean(any(u.reflection_tokens for u in t.turns) for t in sampled),
        "reflection/tokens": mean(t.reflection_tokens for t in corrected),
        "reflection/unneeded": mean(
            any(turn.reflection_tokens and not turn.correction for turn in t.turns) for t in free
        ),
        "completion/tokens": mean(t.trained_tokens for t in sampled),
        "groups/all_succeeded": mean(seen == {True} for seen in outcomes.values()),
        "groups/all_failed": mean(seen == {False} for seen in outcomes.values()),
    }


class Learner:
    """The model with its reference, and the clipped update.

    The reference is kept as the trained parameters at the time of construction: all of a model, or
    an adapter's (which need not have started as zero), and never a second model.
    """

    def __init__(self, model: CausalLM, config: TrainConfig):
        self.model = model
        self.config = config
        ratio_level = config.options.ratio_level
        constant = config.kl_estimator == "k1-constant"
        self._advantage_shift = config.beta if constant else 0.0
        turns = 2 * (config.max_steps if config.mode == "episodes" else 1)
        self.objective = Objective(
            policy=config.policy,
            ratio_level="token" if ratio_level == "token" else "sequence",
            epsilon_low=config.epsilon_low,
            epsilon_high=config.epsilon_high,
            beta=0.0 if constant else config.beta,
            kl_estimator="k1" if constant else config.kl_estimator,
            temperature=config.temperature,
            softcap=logit_softcap(model),
            loss_agg_mode=config.loss_agg_mode,
            max_completion_length=turns * config.max_new_tokens,
        )
        self._start: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        if config.beta > 0:
            trained = (p for p in model.parameters() if p.requires_grad)
            self._start = [(p, p.detach().clone()) for p in trained]

    @contextlib.contextmanager
    def _reference(self) -> Iterator[None]:
        now = [(p, p.data) for p, _ in self._start]
        try:
            for parameter, data in self._start:
                parameter.data = data
            yield
        finally:
            for parameter, data in now:
                parameter.data = data

    @torch.no_grad()
    def log_probs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities [T] of the trained tokens, now."""
        hidden = hidden_states(self.model, batch)
        objective = self.objective
        return packed_log_probs(
            hidden, *head(self.model), batch, objective.temperature, objective.softcap
        )

    def reference_log_probs(self, batch: PackedBatch) -> torch.Tensor | None:
        """Log-probabilities [T] under the reference; None where no KL is asked for."""
        if self.config.beta == 0:
            return None
        with self._reference():
            return self.log_probs(batch)

    def adapt_clipping(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Sets the clip bounds for what the policy makes of an update's tokens now."""
        config, options = self.config, self.config.options
        if options.clip_target is None or not packs:
            return {}
        ratios, advantages = [], []
        for batch in packs:
            assert batch.old_log_probs is not None
            assert batch.advantages is not None
            ratios.append((self.log_probs(batch) - batch.old_log_probs)[batch.loss_mask])
            advantages.append(batch.advantages[batch.loss_mask])
        bounds = adaptive_bounds(
            torch.cat(ratios),
            torch.cat(advantages),
            low=1 - config.epsilon_low,
            high=1 + config.epsilon_high,
            low_max=options.clip_low_max,
            high_max=options.clip_high_max,
            step=options.clip_step,
            target=options.clip_target,
        )
        self.objective = replace(
            self.objective, epsilon_low=1 - bounds.low, epsilon_high=bounds.high - 1
        )
        return {f"clip_bounds/{name}": value for name, value in bounds._asdict().items()}

    def backward(self, batch: PackedBatch, normalizer: float) -> dict[str, float]:
        """Accumulates the gradient of one pack; returns the loss's metrics."""
        if self._advantage_shift:
            assert batch.advantages is not None
            batch = replace(batch, advantages=batch.advantages - self._advantage_shift)
        hidden = hidden_states(self.model, batch)
        by_segment = self.config.options.ratio_level == "segment"
        out = policy_loss(
            hidden, *head(self.model), batch, self.objective, normalizer, by_segment=by_segment
        )
        out.loss.backward()
        metrics = {"loss": out.loss.item(), **{k: v.item() for k, v in out.metrics.items()}}
        if batch.old_log_probs is not None:
            moved = (out.log_probs - batch.old_log_probs[batch.loss_mask]).abs()
            metrics["log_probs/moved"] = moved.mean().item()
        return metrics

    def backward_refinements(self, batch: PackedBatch, normalizer: float) -> None:
        """Accumulates the gradient of refinements, by their shaped ratio."""
        assert batch.advantages is not None
        hidden = hidden_states(self.model, batch)
        objective = self.objective
        now = packed_log_probs(
            hidden, *head(self.model), batch, objective.temperature, objective.softcap
        )
        shaped = batch.advantages * shaped_slope(now, self.config.options.refinement_gamma)
        objective = replace(objective, policy="reinforce", ratio_level="token", beta=0.0)
        batch = replace(batch, advantages=shaped, ref_log_probs=None)
        policy_loss(hidden, *head(self.model), batch, objective, normalizer).loss.backward()

    def backward_demonstrations(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Accumulates the gradient of demonstrations; returns their metrics."""
        weight = self.config.options.demonstration_weight
        if weight == 0:
            return {}
        count = float(sum(batch.loss_mask.sum().item() for batch in packs))
        total = 0.0
        for batch in packs:
            hidden = hidden_states(self.model, batch)
            loss = policy_loss(hidden, *head(self.model), batch, NLL, count / weight).loss
            loss.backward()
            total += loss.item()
        sequences = sum(len(batch.cu_seqlens) - 1 for batch in packs)
        return {"demonstration/count": sequences, "demonstration/nll": total / weight}


def learning_policy(
    config: TrainConfig, model: CausalLM, tokenizer: PreTrainedTokenizerBase
) -> LearningPolicy:
    """Where the configuration samples: in this process, or on a server."""
    rollout, limit = config.rollout, config.max_new_tokens
    if rollout.backend == "server":
        return ServedLearner(
            rollout,
            model,
            tokenizer,
            config.out,
            temperature=config.temperature,
            max_new_tokens=limit,
        )
    return LocalPolicy(
        model,
        tokenizer,
        temperature=config.temperature,
        max_new_tokens=limit,
        cache_gib=rollout.cache_gib,
    )


def run_rl(config: TrainConfig, environment: Environment, progress: Progress | None = None) -> str:
    """Trains, resuming a former run of the same configuration; returns the model's folder.

    A server that samples is asked for before anything is written, and takes the learner's adapter,
    that of a checkpoint or of the update before, at every step.
    """
    tokenizer = load_tokenizer(config.model)
    torch.manual_seed(config.seed)  # a new adapter is drawn
    lora = config.lora
    model = load_model(
        config.model, lora_rank=lora.rank, lora_alpha=lora.alpha, lora_targets=lora.targets
    )
    learner = Learner(model, config)  # copies the reference before a checkpoint is loaded
    policy = learning_policy(config, model, tokenizer)
    model.eval()  # with dropout the learner would not be the policy that sampled
    with Run(config.out, config, model, tokenizer, config.optim, config.steps) as training:
        bar = (
            progress.add_task("train", total=config.steps, completed=training.step)
            if progress
            else None
        )
        log = TrajectoryLog(training, config.log_trajectories_every, config.log_groups)
        while training.step < config.steps:
            began = time.perf_counter()
            policy.renew(1_000_003 * config.seed + training.step)
            trajectories, groups, collected = collect(training, policy, environment, config)
            metrics = update(training, learner, trajectories, groups, log) | collected
            metrics["time/step_s"] = time.perf_counter() - began
            tokens = sum(len(t.tokens) for t in trajectories)
            metrics["time/tokens_per_s"] = tokens / metrics["time/step_s"]
            training.log(metrics)
            training.finish_step(config.save_every)
            if progress and bar is not None:
                line = live_line("train", metrics, WATCHED)
                progress.update(bar, advance=1, description=line)
        training.save_model()
        return str(training.model_path)


def update(
    training: Run,
    learner: Learner,
    trajectories: Sequence[Trajectory],
    groups: Sequence[int] | None = None,
    log: TrajectoryLog | None = None,
) -> dict[str, float]:
    """One update from the trajectories of whole groups; returns its metrics.

    Args:
        groups: ids of the trajectories' groups, equal ones side by side; None for consecutive
            groups of ``group_size``.
    """
    config = learner.config
    groups = groups or group_ids(len(trajectories), config.group_size)
    sampled = config.mode != "offline"
    full = collate([t.tokens for t in trajectories], with_old_log_probs=sampled)
    result, reward_metrics = advantages_of(trajectories, full, config, groups)
    if log:
        log.write(trajectories, result, groups)
    choice = choose(result, full, groups, config)
    metrics = rollout_metrics(trajectories, result, groups) | reward_metrics | choice.metrics
    used, metrics["skipped/too_long"] = within(
        choice.used, [t.tokens for t in trajectories], config.batch_tokens
    )

    def packs_from(*origins: str) -> list[PackedBatch]:
        indices = [i for i in used if trajectories[i].origin in origins]
        packs = pack_chosen(indices, groups, trajectories, full, result, config.batch_tokens)
        return [batch.to(training.device) for batch in packs]

    packs, refined = packs_from("policy", "replay"), packs_from("refinement")
    packs = [replace(b, ref_log_probs=learner.reference_log_probs(b)) for b in packs]
    demonstrations = pack_demonstrations(training, trajectories, groups, config)
    # What the mean is over, in the whole update: its packs add up to the same gradient.
    count = sum(trajectories[i].trained_tokens for i in choice.kept)
    normalizer = float(count if config.loss_agg_mode == "token-mean" else len(choice.kept))
    for epoch in range(config.epochs):
        metrics |= learner.adapt_clipping(packs)
        parts = [learner.backward(batch, normalizer) for batch in packs]
        if epoch == 0 and parts and sampled:
            # Before anything was learned: how far the sampler's numerics are from the learner's.
            metrics["log_probs/sampler"] = mean_metrics(parts, packs)["log_probs/moved"]
        for batch in refined:
            learner.backward_refinements(batch, normalizer)
        metrics |= learner.backward_demonstrations(demonstrations)
        metrics["grad_norm"] = training.update()
    metrics |= mean_metrics(parts, packs) | {"lr": training.lr}
    trained = [*packs, *refined]
    metrics["trajectories"] = len(trajectories)
    metrics["tokens"] = config.epochs * sum(len(batch.input_ids) for batch in trained)
    metrics["trained_tokens"] = config.epochs * sum(int(b.loss_mask.sum()) for b in trained)
    return metrics


def pack_chosen(
    indices: Sequence[int],
    groups: Sequence[int],
    trajectories: Sequence[Trajectory],
    full: PackedBatch,
    result: ReflectionAdvantages,
    batch_tokens: int,
) -> list[PackedBatch]:
    """Packs of some of the trajectories of ``full``, with their advantages; what those of a group
    share is computed once."""
    starts = full.cu_seqlens.tolist()
    tokens = [t.tokens for t in trajectories]
    members = [[i for i in indices if groups[i] == group] for group in dict.fromkeys(groups)]
    packs = []
    for chosen in pack_groups([m for m in members if m], tokens, batch_tokens):
        sampled = full.old_log_probs is not None
        batch = collate([tokens[i] for i in chosen], with_old_log_probs=sampled, share=True)
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
        packs.append(replace(batch, advantages=result.token_advantages[rows]))
    return packs


def pack_demonstrations(
    training: Run, trajectories: Sequence[Trajectory], groups: Sequence[int], config: TrainConfig
) -> list[PackedBatch]:
    """Packs of demonstrations for the states in which no trajectory succeeded."""
    if config.options.demonstration_weight == 0:
        return []
    shown = [
        demonstration_tokens(training.tokenizer, start, reflect=config.reflect)
        for start in hard_states(trajectories, groups)
    ]
    packs = best_fit_decreasing([len(tokens) for tokens in shown], config.batch_tokens)
    return [collate([shown[i] for i in pack]).to(training.device) for pack in packs]


def mean_metrics(
    parts: Sequence[dict[str, float]], packs: Sequence[PackedBatch]
) -> dict[str, float]:
    """Of the packs of an update: losses add up, others are means over trained tokens, or bounds."""
    if not parts:  # what joined a group was all that was chosen of it
        return {"loss": 0.0}
    trained = [float(batch.loss_mask.sum()) for batch in packs]
    metrics = {"loss": sum(part["loss"] for part in parts)}
    for name in parts[0]:
        if name == "loss":
            continue
        values = [part[name] for part in parts]
        if name.endswith(("/min", "/max")):
            metrics[name] = min(values) if name.endswith("/min") else max(values)
        else:
            weighted = sum(v * n for v, n in zip(values, trained, strict=True))
            metrics[name] = weighted / sum(trained)
    return metrics


def within(
    indices: Sequence[int], tokens: Sequence[TokenizedTrajectory], batch_tokens: int
) -> tuple[list[int], int]:
    """Those of the trajectories that a pass has room for, and how many of them are too long.

    Raises:
        RunError: all of them.
    """
    kept = [i for i in indices if len(tokens[i]) <= batch_tokens]
    if not kept:
        raise RunError(
            f"batch_tokens is {batch_tokens}, and the shortest trajectory of an update has "
            f"{min(len(tokens[i]) for i in indices)} tokens; raise batch_tokens"
        )
    return kept, len(indices) - len(kept)
