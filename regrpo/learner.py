"""The model that learns: its objective, its reference, and the gradient of packs."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from regrpo.config import TrainConfig
from regrpo.distributed import ALONE, Ranks
from regrpo.losses import packed_log_probs, policy_loss
from regrpo.modeling import CausalLM, logit_softcap
from regrpo.options.clip_bounds import adaptive_bounds
from regrpo.options.refinements import shaped_slope
from regrpo.packed_model import PackedModel
from regrpo.packing import PackedBatch
from regrpo.sft import NLL, backward
from regrpo.sharding import release
from regrpo_kernels import Objective


class Learner:
    """The model with its reference, and the clipped update.

    The reference is kept as the trained parameters at the time of construction: all of a model, or
    an adapter's (which need not have started as zero), and never a second model.

    Args:
        packed: the model as the run computes it; None for the model as it is.
        ranks: the processes that learn together.
    """

    def __init__(
        self,
        model: CausalLM,
        config: TrainConfig,
        *,
        packed: PackedModel | None = None,
        ranks: Ranks = ALONE,
    ):
        self.model = model
        self.config = config
        self.packed = packed or PackedModel(model)
        self.ranks = ranks
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
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Parameters and reference change places, one at a time and where they lie: shards, as
        FSDP gathers them, are parts of larger buffers."""
        for parameter, start in self._start:
            now = parameter.clone()
            parameter.copy_(start)
            start.copy_(now)

    @torch.no_grad()
    def log_probs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities [T] of the trained tokens, now."""
        hidden = self.packed(batch)
        objective = self.objective
        values = packed_log_probs(
            hidden, *self.packed.head(), batch, objective.temperature, objective.softcap
        )
        release(self.packed)
        return values

    def reference_log_probs(self, batch: PackedBatch) -> torch.Tensor | None:
        """Log-probabilities [T] under the reference; None where no KL is asked for."""
        if self.config.beta == 0:
            return None
        with self._reference():
            return self.log_probs(batch)

    def adapt_clipping(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Sets the clip bounds for what the policy makes of an update's tokens now."""
        config, options = self.config, self.config.options
        if options.clip_target is None or not self.ranks.any(bool(packs)):
            return {}
        ratios, advantages = [torch.zeros(0)], [torch.zeros(0)]
        for batch in packs:
            assert batch.old_log_probs is not None
            assert batch.advantages is not None
            ratios.append((self.log_probs(batch) - batch.old_log_probs)[batch.loss_mask].cpu())
            advantages.append(batch.advantages[batch.loss_mask].cpu())
        everywhere = self.ranks.gather((torch.cat(ratios), torch.cat(advantages)))
        bounds = adaptive_bounds(
            torch.cat([ratios for ratios, _ in everywhere]),
            torch.cat([advantages for _, advantages in everywhere]),
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
        hidden = self.packed(batch)
        by_segment = self.config.options.ratio_level == "segment"
        out = policy_loss(
            hidden, *self.packed.head(), batch, self.objective, normalizer, by_segment=by_segment
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
        hidden = self.packed(batch)
        objective = self.objective
        now = packed_log_probs(
            hidden, *self.packed.head(), batch, objective.temperature, objective.softcap
        )
        shaped = batch.advantages * shaped_slope(now, self.config.options.refinement_gamma)
        objective = replace(objective, policy="reinforce", ratio_level="token", beta=0.0)
        batch = replace(batch, advantages=shaped, ref_log_probs=None)
        policy_loss(hidden, *self.packed.head(), batch, objective, normalizer).loss.backward()

    def backward_demonstrations(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Accumulates the gradient of demonstrations; returns their metrics."""
        weight = self.config.options.demonstration_weight
        if weight == 0:
            return {}
        count = self.ranks.sum(float(sum(batch.loss_mask.sum().item() for batch in packs)))
        total = backward(self.packed, packs, NLL, count / weight)
        sequences = sum(len(b.cu_seqlens) - 1 for b in packs if b.loss_mask.any())
        return {"demonstration/count": sequences, "demonstration/nll": total / weight}
