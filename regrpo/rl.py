"""On-policy ReGRPO (arXiv 2606.31392) on local trajectories.

An update: for every state, K trajectories ``a0 -> o0 -> z -> a1 -> o1`` are sampled and executed;
success minus reflection cost is compared inside the group of K; reflections and actions are trained
together with clipped ratios against the behaviour policy. A share of the states starts behind a
near-miss that was executed already. With ``reflect=False`` the same loop is GRPO with plain
retries.

Deviations from the official release: it samples nothing and clips nothing; here old log-probs come
from the sampler, and the reference is the model before the run (of a new adapter: the adapter off).
"""

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from rich.progress import Progress

from regrpo.config import TrainConfig
from regrpo.data_engine.build import demonstrate, local_starts
from regrpo.environment import Environment
from regrpo.errors import RunError
from regrpo.losses import packed_log_probs, policy_loss
from regrpo.modeling import CausalLM, head, hidden_states, load_model, load_tokenizer
from regrpo.packing import PackedBatch, best_fit_decreasing, collate
from regrpo.progress import live_line
from regrpo.rollout import Trajectory, run
from regrpo.sampling import LocalPolicy
from regrpo.segments import TokenizedTrajectory
from regrpo.trainer import Run, mean
from regrpo.trajectory import Start
from regrpo.trajectory_log import TrajectoryLog
from regrpo_kernels import Objective, ReflectionAdvantages, reflection_advantages

WATCHED = ("reward/mean", "success", "recovery", "reflection/rate")


def sample_starts(config: TrainConfig, environment: Environment, step: int) -> list[Start]:
    """The states of one update: a function of configuration and step, so a resumed run agrees."""
    tasks = config.tasks.generate(config.states, first=step * config.states)
    demonstrations, _ = demonstrate(environment, tasks, seed=config.seed)
    rng = random.Random(f"{config.seed}-{step}")
    return local_starts(demonstrations, rng, forced_share=config.forced_share)


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
    corrected = [t for t in trajectories if t.turns[-1].correction]
    free = [t for t in trajectories if not t.start.failed]
    spread = groups_with_variance(result, group_size)
    return {
        "reward/mean": result.rewards.mean().item(),
        "reward/std": result.rewards.std().item(),
        "success": mean(t.success for t in trajectories),
        "success/first_try": mean(t.success and not t.turns[-1].correction for t in free),
        "recovery": mean(t.success for t in corrected),
        "reflection/rate": mean(any(u.reflection_tokens for u in t.turns) for t in trajectories),
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
        self.objective = Objective(
            policy="clip",
            epsilon_low=config.epsilon_low,
            epsilon_high=config.epsilon_high,
            beta=config.beta,
            kl_estimator=config.kl_estimator,
            temperature=config.temperature,
            loss_agg_mode=config.loss_agg_mode,
            max_completion_length=2 * config.max_new_tokens,  # two turns
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
        log = TrajectoryLog(training, config.log_trajectories_every, config.log_groups)
        while training.step < config.steps:
            began = time.perf_counter()
            policy.generator.manual_seed(1_000_003 * config.seed + training.step)
            starts = sample_starts(config, environment, training.step)
            groups = [start for start in starts for _ in range(config.group_size)]
            trajectories = run(policy, environment, groups, reflect=config.reflect, whole=False)
            metrics = update(training, learner, trajectories, log)
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
    log: TrajectoryLog | None = None,
) -> dict[str, float]:
    """One update from the trajectories of whole groups."""
    config = learner.config
    tokens = [t.tokens for t in trajectories]
    full = collate(tokens, with_old_log_probs=True)
    result = advantages_of(trajectories, full, config)
    metrics = rollout_metrics(trajectories, result, config.group_size)
    if log:
        log.write(trajectories, result, [i // config.group_size for i in range(len(tokens))])
    starts = full.cu_seqlens.tolist()
    used = list(range(len(tokens)))
    live = groups_with_variance(result, config.group_size)
    if config.skip_zero_variance and live.any():
        used = live.repeat_interleave(config.group_size).nonzero().squeeze(1).tolist()
    used, metrics["skipped/too_long"] = within(used, tokens, config.batch_tokens)
    packs = []
    for pack in best_fit_decreasing([len(tokens[i]) for i in used], config.batch_tokens):
        indices = [used[i] for i in pack]
        batch = collate([tokens[i] for i in indices], with_old_log_probs=True)
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
