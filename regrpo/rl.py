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

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from regrpo.advantages import advantages_of, choose, group_ids
from regrpo.collect import collect
from regrpo.config import TrainConfig
from regrpo.config.checks import require
from regrpo.distributed import ALONE, Ranks
from regrpo.environment import Environment
from regrpo.errors import RunError
from regrpo.images import ImageReader
from regrpo.learner import Learner
from regrpo.modeling import CausalLM, load_image_reader, load_tokenizer
from regrpo.options.demonstrations import demonstration_tokens, hard_states
from regrpo.packed_model import load_packed
from regrpo.packing import PackedBatch, best_fit_decreasing, collate, pack_groups
from regrpo.progress import live_line
from regrpo.rl_metrics import outcomes, over_ranks, pack_metrics, rollout_metrics
from regrpo.rollout import LearningPolicy, Trajectory
from regrpo.sampling import LocalPolicy
from regrpo.segments import TokenizedTrajectory
from regrpo.served_adapter import ServedLearner
from regrpo.trainer import Run
from regrpo.trajectory_log import TrajectoryLog
from regrpo_kernels import ReflectionAdvantages

WATCHED = ("reward/mean", "success", "recovery", "reflection/rate")


def learning_policy(
    config: TrainConfig,
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    reader: ImageReader | None = None,
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
        reader=reader,
    )


def run_rl(
    config: TrainConfig,
    environment: Environment,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> str:
    """Trains, resuming a former run of the same configuration; returns the model's folder.

    A server that samples is asked for before anything is written, and takes the learner's adapter,
    that of a checkpoint or of the update before, at every step.

    Args:
        ranks: the processes that train together; each samples from its share of the states.

    Raises:
        ValueError: more processes than states, or an option that needs all rewards in one process.
    """
    require_fitting(config, ranks)
    tokenizer = load_tokenizer(config.model)
    reader = load_image_reader(config.model, tokenizer)
    torch.manual_seed(config.seed)  # a new adapter is drawn
    packed = load_packed(config, ranks)
    model = packed.model
    # Copies the reference before a checkpoint is loaded.
    learner = Learner(model, config, packed=packed, ranks=ranks)
    policy = learning_policy(config, model, tokenizer, reader)
    model.eval()  # with dropout the learner would not be the policy that sampled
    with Run(
        config.out, config, model, tokenizer, config.optim, config.steps, ranks=ranks, reader=reader
    ) as training:
        bar = (
            progress.add_task("train", total=config.steps, completed=training.step)
            if progress
            else None
        )
        log = TrajectoryLog(training, config.log_trajectories_every, config.log_groups)
        while training.step < config.steps:
            began = time.perf_counter()
            policy.renew(ranks.seed(config.seed, training.step))
            with packed.sampling():
                trajectories, groups, own = collect(training, policy, environment, config)
            collected = over_ranks(ranks, own, len(trajectories))
            metrics = update(training, learner, trajectories, groups, log) | collected
            metrics["time/step_s"] = time.perf_counter() - began
            tokens = ranks.sum(sum(len(t.tokens) for t in trajectories))
            metrics["time/tokens_per_s"] = tokens / metrics["time/step_s"]
            training.log(metrics)
            training.finish_step(config.save_every)
            if progress and bar is not None:
                line = live_line("train", metrics, WATCHED)
                progress.update(bar, advance=1, description=line)
        training.save_model()
        return str(training.model_path)


def require_fitting(config: TrainConfig, ranks: Ranks) -> None:
    """Raises a ``ValueError`` for what so many processes cannot do."""
    require(
        config.states >= ranks.size,
        "states",
        config.states,
        f"at least one for each of the {ranks.size} processes",
    )
    require(
        ranks.size == 1 or config.reward.scale != "batch",
        "reward.scale",
        config.reward.scale,
        f"group or none with {ranks.size} processes, of which none has all rewards",
    )
    require(
        ranks.size == 1 or config.rollout.backend == "local",
        "rollout.backend",
        config.rollout.backend,
        f"local with {ranks.size} processes, which would each send their adapter",
    )


def update(
    training: Run,
    learner: Learner,
    trajectories: Sequence[Trajectory],
    groups: Sequence[int] | None = None,
    log: TrajectoryLog | None = None,
) -> dict[str, float]:
    """One update from the trajectories of whole groups; returns its metrics.

    Of several processes each brings trajectories of its own, or none, and all of them have the
    metrics of the whole update.

    Args:
        groups: ids of the trajectories' groups, equal ones side by side; None for consecutive
            groups of ``group_size``.
    """
    config, ranks = learner.config, learner.ranks
    groups = groups or group_ids(len(trajectories), config.group_size)
    sampled = config.mode != "offline"
    full = collate([t.tokens for t in trajectories], with_old_log_probs=sampled)
    result, reward_metrics = advantages_of(trajectories, full, config, groups, training.step)
    if log:
        log.write(trajectories, result, groups)
    choice = choose(result, full, groups, config, ranks)
    used, too_long = within(
        choice.used, [t.tokens for t in trajectories], config.batch_tokens, ranks
    )

    def packs_from(*origins: str) -> list[PackedBatch]:
        indices = [i for i in used if trajectories[i].origin in origins]
        packs = pack_chosen(indices, groups, trajectories, full, result, config.batch_tokens)
        packs = [batch.to(training.device) for batch in packs]
        return learner.packed.equal_passes(packs, ranks)

    packs, refined = packs_from("policy", "replay"), packs_from("refinement")
    packs = [replace(b, ref_log_probs=learner.reference_log_probs(b)) for b in packs]
    demonstrations = learner.packed.equal_passes(
        pack_demonstrations(training, trajectories, groups, config), ranks
    )
    # What the mean is over, in the whole update: its packs add up to the same gradient, in
    # whichever process they are.
    count = sum(trajectories[i].trained_tokens for i in choice.kept)
    own = count if config.loss_agg_mode == "token-mean" else len(choice.kept)
    normalizer = float(ranks.sum(own))
    steps: dict[str, float] = {}
    before: dict[str, float] = {}
    for epoch in range(config.epochs):
        steps |= learner.adapt_clipping(packs)
        parts = [learner.backward(batch, normalizer) for batch in packs]
        now = pack_metrics(parts, packs)
        if epoch == 0 and "log_probs/moved" in now:
            # Before anything was learned: how far the sampler's numerics are from the learner's.
            before = {"log_probs/sampler": now["log_probs/moved"]}
        for batch in refined:
            learner.backward_refinements(batch, normalizer)
        taught = learner.backward_demonstrations(demonstrations)
        steps["grad_norm"] = training.update()
    trained = [*packs, *refined]
    trained_tokens = sum(int(b.loss_mask.sum()) for b in trained)
    of_rollouts = reward_metrics | choice.metrics | {"skipped/too_long": too_long}
    of_packs = now | before
    of_update = {
        "trajectories": len(trajectories),
        "tokens": config.epochs * sum(len(b.input_ids) for b in trained if b.loss_mask.any()),
        "trained_tokens": config.epochs * trained_tokens,
    }
    metrics = rollout_metrics(ranks.gather(outcomes(trajectories, result.rewards, groups)))
    metrics |= over_ranks(ranks, of_rollouts | taught | of_update, len(trajectories))
    weight = sum(int(b.loss_mask.sum()) for b in packs)
    return metrics | over_ranks(ranks, of_packs, weight) | steps | {"lr": training.lr}


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
        demonstration_tokens(
            training.tokenizer, start, reflect=config.reflect, reader=training.reader
        )
        for start in hard_states(trajectories, groups)
    ]
    packs = best_fit_decreasing([len(tokens) for tokens in shown], config.batch_tokens)
    return [collate([shown[i] for i in pack]).to(training.device) for pack in packs]


def within(
    indices: Sequence[int],
    tokens: Sequence[TokenizedTrajectory],
    batch_tokens: int,
    ranks: Ranks = ALONE,
) -> tuple[list[int], int]:
    """Those of the trajectories that a pass has room for, and how many of them are too long.

    Raises:
        RunError: all of them are, in all processes.
    """
    kept = [i for i in indices if len(tokens[i]) <= batch_tokens]
    if not ranks.any(bool(kept)):
        shortest = min(ranks.gather(min((len(tokens[i]) for i in indices), default=1 << 62)))
        raise RunError(
            f"batch_tokens is {batch_tokens}, and the shortest trajectory of an update has "
            f"{shortest} tokens; raise batch_tokens"
        )
    return kept, len(indices) - len(kept)
