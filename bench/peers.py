"""Other libraries, where they are installed, doing the same work: clipped ratio, k3 KL, old and
reference log-probs, the same mask, forward and backward.

Where a peer cannot do all of it, it does what it can, and its note says what is missing. They are
imported when a case asks for them, so that none is needed.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import eager
from bench.machine import DEVICE
from bench.measure import Call, Provider

if TYPE_CHECKING:
    from bench.linear import Batch as LinearBatch
    from bench.rows import Batch as RowBatch

ONE_ADVANTAGE = "one advantage a sequence"
TRL_CHUNK = 32768  # columns of the vocabulary; what TRL's trainers pass


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# --- rows -----------------------------------------------------------------------------------------


def log_prob_peers(batch: RowBatch, entropy: bool) -> list[Provider]:
    found = []
    if installed("trl"):
        found.append(Provider("trl", "peer", lambda: _trl_log_probs(batch, entropy)))
    if installed("liger_kernel") and DEVICE.type == "cuda" and not entropy:
        found.append(Provider("liger", "peer", lambda: _liger_log_probs(batch)))
    if installed("quack") and DEVICE.type == "cuda" and not entropy:
        found.append(Provider("quack", "peer", lambda: _quack_log_probs(batch)))
    return found


def grpo_peers(batch: RowBatch) -> list[Provider]:
    found = []
    if installed("trl"):
        note = "log-probs by selective_log_softmax, the objective in eager"
        found.append(Provider("trl", "peer", lambda: _trl_loss(batch), note=note))
    if installed("liger_kernel") and DEVICE.type == "cuda":
        found.append(
            Provider("liger inplace", "peer", lambda: _liger_loss(batch), note=ONE_ADVANTAGE)
        )
    if installed("quack") and DEVICE.type == "cuda":
        note = "log-probs by cross_entropy in place, the objective in eager"
        found.append(Provider("quack inplace", "peer", lambda: _quack_loss(batch), note=note))
    return found


def _trl_function(entropy: bool) -> Any:
    if DEVICE.type == "cuda":  # what trl.trainer.utils calls there, without its many imports
        from trl.kernels import selective_log_softmax_and_entropy

        if entropy:
            return selective_log_softmax_and_entropy
        return lambda *a, **k: selective_log_softmax_and_entropy(*a, **k)[0]
    from trl.trainer import utils

    return utils.selective_log_softmax_and_entropy if entropy else utils.selective_log_softmax


def _trl_log_probs(batch: RowBatch, entropy: bool) -> Call:
    function = _trl_function(entropy)
    return torch.no_grad()(lambda: function(batch.logits, batch.labels, row_mask=batch.mask))


def _trl_loss(batch: RowBatch) -> Call:
    function = _trl_function(entropy=False)

    def call() -> Tensor:
        log_probs = function(batch.logits, batch.labels, row_mask=batch.mask)
        loss = eager.objective(log_probs, *batch.tokens[1:])
        return torch.autograd.grad(loss, batch.logits)[0]

    return call


def _liger_log_probs(batch: RowBatch) -> Call:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    labels, mask = batch.padded_tokens[0], batch.padded_tokens[-1].int()
    return lambda: fused_selective_log_softmax(batch.padded.detach(), labels, 1.0, mask)


def _liger_loss(batch: RowBatch) -> Call:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    labels, _, old, ref, mask = batch.padded_tokens
    mask = mask.int()

    def call() -> Tensor:
        loss, _ = triton_grpo_loss(
            batch.padded,
            old,
            ref,
            labels,
            batch.sequence_advantages,
            mask,
            temperature=1.0,
            beta=eager.BETA,
            eps_low=eager.EPSILON,
            eps_high=eager.EPSILON,
            inplace=True,
            loss_type="dapo",  # the mean over the tokens of the mask
            reduce=True,
        )
        return torch.autograd.grad(loss, batch.padded)[0]

    return call


def _quack_log_probs(batch: RowBatch) -> Call:
    from quack.cross_entropy import cross_entropy

    rows = batch.logits.detach().view(
        -1, batch.case.vocab
    )  # a padded view fails here, as it does there
    labels = batch.masked_labels.flatten()
    return lambda: -cross_entropy(rows, labels, reduction="none").view(batch.labels.shape)


def _quack_loss(batch: RowBatch) -> Call:
    from quack.cross_entropy import cross_entropy

    labels = batch.masked_labels.flatten()

    def call() -> Tensor:
        rows = batch.logits.view(-1, batch.case.vocab)
        nll = cross_entropy(rows, labels, reduction="none", inplace_backward=True)
        loss = eager.objective(-nll.view(batch.labels.shape), *batch.tokens[1:])
        return torch.autograd.grad(loss, batch.logits)[0]

    return call


# --- from hidden states ---------------------------------------------------------------------------


def linear_log_prob_peers(batch: LinearBatch) -> list[Provider]:
    found = []
    if installed("cut_cross_entropy"):
        found.append(Provider("cut-cross-entropy", "peer", lambda: _cce_log_probs(batch)))
    if installed("trl"):
        found.append(Provider("trl", "peer", lambda: _trl_linear_log_probs(batch)))
    return found


def linear_grpo_peers(batch: LinearBatch) -> list[Provider]:
    found = []
    if installed("liger_kernel"):
        build = lambda: _liger_linear_loss(batch)  # noqa: E731
        found.append(Provider("liger chunked", "peer", build, note=ONE_ADVANTAGE))
    if installed("cut_cross_entropy"):
        note = "the objective in eager; filter_eps=None, for an exact gradient"
        found.append(Provider("cut-cross-entropy", "peer", lambda: _cce_loss(batch), note=note))
    if installed("trl"):
        note = "ChunkedLogProbFunction, the objective in eager"
        found.append(Provider("trl", "peer", lambda: _trl_linear_loss(batch), note=note))
    if installed("quack") and DEVICE.type == "cuda":
        note = "mean cross entropy: no ratio, no KL, no advantages"
        found.append(
            Provider(
                "quack linear CE", "peer", lambda: _quack_linear(batch), note=note, checked=False
            )
        )
    return found


def _liger_linear_loss(batch: LinearBatch) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # chunk_size counts sequences, of which a packed batch is one; inside, chunks are 2048 x 4096
    module = LigerFusedLinearGRPOLoss(beta=eager.BETA, chunk_size=1)
    one = [x[None] for x in batch.tokens]
    labels, _, old, ref, mask = one

    def call() -> None:
        loss, _ = module(
            batch.hidden[None],
            batch.weight,
            labels,
            mask.int(),
            batch.sequence_advantages,
            ref_per_token_logps=ref,
            old_per_token_logps=old,
        )
        loss.backward()

    return call


def _cce(batch: LinearBatch) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if DEVICE.type == "cuda" else "torch_compile"
    return lambda: (
        -linear_cross_entropy(
            batch.hidden,
            batch.weight,
            batch.masked_labels,
            reduction="none",
            filter_eps=None,
            impl=impl,
        )
    )


def _cce_log_probs(batch: LinearBatch) -> Call:
    return torch.no_grad()(_cce(batch))


def _cce_loss(batch: LinearBatch) -> Call:
    log_probs = _cce(batch)
    return lambda: eager.objective(log_probs(), *batch.tokens[1:]).backward()


def _trl_linear(batch: LinearBatch) -> Any:
    from trl.kernels import ChunkedLogProbFunction

    def log_probs() -> Tensor:
        # as TRL's fused head: on a GPU, only trained positions are scored
        some = DEVICE.type == "cuda"
        found = ChunkedLogProbFunction.apply(
            batch.hidden[batch.mask] if some else batch.hidden,
            batch.weight,
            None,
            batch.labels[batch.mask] if some else batch.labels,
            1.0,
            TRL_CHUNK,
            None,
            1.0,
            (),
        )[0]
        if not some:
            return found
        return found.new_zeros(batch.mask.shape).masked_scatter(batch.mask, found)

    return log_probs


def _trl_linear_log_probs(batch: LinearBatch) -> Call:
    return torch.no_grad()(_trl_linear(batch))


def _trl_linear_loss(batch: LinearBatch) -> Call:
    log_probs = _trl_linear(batch)
    return lambda: eager.objective(log_probs(), *batch.tokens[1:]).backward()


def _quack_linear(batch: LinearBatch) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: chunked_linear_cross_entropy(
        batch.hidden, batch.weight, batch.masked_labels
    ).backward()
