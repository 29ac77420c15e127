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
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from rich.progress import Progress

from regrpo.confidence import with_confidences
from regrpo.config import TrainConfig
from regrpo.data_engine.build import demonstrate, local_starts
from regrpo.environment import Environment
from regrpo.losses import packed_log_probs, policy_loss
from regrpo.modeling import CausalLM, head, hidden_states, load_model, load_tokenizer
from regrpo.offline import offline_trajectories
from regrpo.own_states import own_states
from regrpo.packing import PackedBatch, best_fit_decreasing, collate
from regrpo.rollout import Trajectory, run, task_start
from regrpo.sampling import LocalPolicy
from regrpo.trainer import Run, mean
from regrpo.trajectory import Start
from regrpo_kernels import Objective, ReflectionAdvantages, reflection_advantages


def sample_starts(config: TrainConfig, environment: Environment, step: int) -> list[Start]:
    """The states of one update: a function of configuration and step, so a resumed run agrees."""
    tasks = config.tasks.generate(config.states, first=step * config.states)
    demonstrations, _ = demonstrate(environment, tasks, seed=config.seed)
    rng = random.Random(f"{config.seed}-{step}")
    starts = local_starts(demonstrations, rng, forced_share=config.forced_share)
    if config.mode == "episodes":
        return [start if start.failed else task_start(start.task) for start in starts]
    return starts


def collect(
    config: TrainConfig, policy: LocalPolicy, environment: Environment, step: int
) -> tuple[list[Trajectory], dict[str, float]]:
    """The trajectories of one update, groups consecutive, and metrics of how they came about."""
    if config.mode == "offline":
        return offline_trajectories(config, policy.chat, environment, step)
    starts = sample_starts(config, environment, step)
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
        )
    groups = [start for start in starts for _ in range(config.group_size)]
    whole = config.mode == "episodes"
    trajectories = run(
        policy,
        environment,
        groups,
        reflect=config.reflect,
        whole=whole,
        max_steps=config.max_steps,
        trigger=config.trigger,
    )
    return trajectories, metrics | (episode_metrics(trajectories) if whole else {})


def with_own_states(
    config: TrainConfig,
    policy: LocalPolicy,
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


def advantages_of(
    trajectories: Sequence[Trajectory], batch: PackedBatch, config: TrainConfig
) -> ReflectionAdvantages:
    """Rewards and group advantages; trajectories of a group are consecutive."""
    reward = config.reward
    return reflection_advantages(
        torch.tensor([float(t.success) for t in trajectories]),
        batch.segment_ids,
        batch.cu_seqlens,
        config.group_size,
        lambda_exec=reward.lambda_exec,
        eta=reward.eta,
        tokens_per_cost=reward.tokens_per_cost,
        baseline=reward.baseline,
        scale=reward.scale,
        min_std=reward.min_std,
        clip=reward.clip,
    )


def groups_with_variance(result: ReflectionAdvantages, group_size: int) -> torch.Tensor:
    """bool [groups]: whether a group's trajectories differ in advantage."""
    return result.advantages.view(-1, group_size).abs().amax(1) > 0


def rollout_metrics(
    trajectories: Sequence[Trajectory], result: ReflectionAdvantages, group_size: int
) -> dict[str, float]:
    """What the sampled trajectories of an update did."""
    corrected = [t for t in trajectories if any(turn.correction for turn in t.turns)]
    free = [t for t in trajectories if not t.start.failed]
    spread = groups_with_variance(result, group_size)
    return {
        "reward/mean": result.rewards.mean().item(),
        "reward/std": result.rewards.std().item(),
        "success": mean(t.success for t in trajectories),
        "success/first_try": mean(
            t.success and not any(turn.correction for turn in t.turns) for t in free
        ),
        "recovery": mean(t.success for t in corrected),
        "reflection/tokens": mean(t.reflection_tokens for t in corrected),
        "reflection/unneeded": mean(
            any(turn.reflection_tokens and not turn.correction for turn in t.turns) for t in free
        ),
        "completion/tokens": result.loss_mask.sum().item() / len(trajectories),
        "groups/with_variance": spread.float().mean().item(),
    }


class Learner:
    """The model with its reference, and the clipped update.

    The reference is kept as the trained parameters at the time of construction: all of a model, or
    an adapter's (which need not have started as zero), and never a second model.
    """

    def __init__(self, model: CausalLM, config: TrainConfig):
        self.model = model
        self.config = config
        constant = config.kl_estimator == "k1-constant"
        self._advantage_shift = config.beta if constant else 0.0
        turns = 2 * (config.max_steps if config.mode == "episodes" else 1)
        self.objective = Objective(
            policy=config.policy,
            epsilon_low=config.epsilon_low,
            epsilon_high=config.epsilon_high,
            beta=0.0 if constant else config.beta,
            kl_estimator="k1" if constant else config.kl_estimator,
            temperature=config.temperature,
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
    def reference_log_probs(self, batch: PackedBatch) -> torch.Tensor | None:
        """Log-probabilities [T] under the reference; None where no KL is asked for."""
        if self.config.beta == 0:
            return None
        with self._reference():
            hidden = hidden_states(self.model, batch)
            return packed_log_probs(hidden, *head(self.model), batch, self.config.temperature)

    def backward(self, batch: PackedBatch, normalizer: float) -> dict[str, float]:
        """Accumulates the gradient of one pack; returns the loss's metrics."""
        if self._advantage_shift:
            assert batch.advantages is not None
            batch = replace(batch, advantages=batch.advantages - self._advantage_shift)
        hidden = hidden_states(self.model, batch)
        out = policy_loss(hidden, *head(self.model), batch, self.objective, normalizer)
        out.loss.backward()
        return {"loss": out.loss.item(), **{k: v.item() for k, v in out.metrics.items()}}


def run_rl(config: TrainConfig, environment: Environment, progress: Progress | None = None) -> str:
    """Trains, resuming a former run of the same configuration; returns the model's folder."""
    tokenizer = load_tokenizer(config.model)
    torch.manual_seed(config.seed)  # a new adapter is drawn
    lora = config.lora
    model = load_model(
        config.model, lora_rank=lora.rank, lora_alpha=lora.alpha, lora_targets=lora.targets
    )
    learner = Learner(model, config)  # copies the reference before a checkpoint is loaded
    policy = LocalPolicy(
        model, tokenizer, temperature=config.temperature, max_new_tokens=config.max_new_tokens
    )
    model.eval()  # with dropout the learner would not be the policy that sampled
    with Run(config.out, config, model, tokenizer, config.optim, config.steps) as training:
        bar = (
            progress.add_task("train", total=config.steps, completed=training.step)
            if progress
            else None
        )
        while training.step < config.steps:
            began = time.perf_counter()
            policy.generator.manual_seed(1_000_003 * config.seed + training.step)
            trajectories, collected = collect(config, policy, environment, training.step)
            metrics = update(training, learner, trajectories) | collected
            metrics["time/step_s"] = time.perf_counter() - began
            training.log(metrics)
            training.finish_step(config.save_every)
            if progress and bar is not None:
                text = f"train success {metrics['success']:.2f} recovery {metrics['recovery']:.2f}"
                progress.update(bar, advance=1, description=text)
        training.save_model()
        return str(training.model_path)


def update(training: Run, learner: Learner, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """One update from the trajectories of whole groups."""
    config = learner.config
    tokens = [t.tokens for t in trajectories]
    sampled = config.mode != "offline"
    full = collate(tokens, with_old_log_probs=sampled)
    result = advantages_of(trajectories, full, config)
    metrics = rollout_metrics(trajectories, result, config.group_size)
    starts = full.cu_seqlens.tolist()
    used = list(range(len(tokens)))
    live = groups_with_variance(result, config.group_size)
    if config.skip_zero_variance and live.any():
        used = live.repeat_interleave(config.group_size).nonzero().squeeze(1).tolist()
    packs = []
    for pack in best_fit_decreasing([len(tokens[i]) for i in used], config.batch_tokens):
        indices = [used[i] for i in pack]
        batch = collate([tokens[i] for i in indices], with_old_log_probs=sampled)
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices])
        batch = replace(batch, advantages=result.token_advantages[rows]).to(training.device)
        packs.append(replace(batch, ref_log_probs=learner.reference_log_probs(batch)))
    count = float(full.loss_mask.sum())
    # What the mean is over, in the whole update: its packs add up to the same gradient.
    normalizer = count if config.loss_agg_mode == "token-mean" else float(len(trajectories))
    for _ in range(config.epochs):
        parts = [learner.backward(batch, normalizer) for batch in packs]
        metrics["grad_norm"] = training.update()
    metrics["loss"] = sum(part.pop("loss") for part in parts)
    trained = [float(batch.loss_mask.sum()) for batch in packs]
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name.endswith(("/min", "/max")):
            metrics[name] = min(values) if name.endswith("/min") else max(values)
        else:
            weighted = sum(v * n for v, n in zip(values, trained, strict=True))
            metrics[name] = weighted / sum(trained)
    metrics["lr"] = training.lr
    metrics["trajectories"] = len(trajectories)
    metrics["tokens"] = sum(len(tokens[i]) for i in used) * config.epochs
    metrics["trained_tokens"] = sum(trained) * config.epochs
    return metrics
