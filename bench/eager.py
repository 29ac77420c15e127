"""The losses as one writes them in PyTorch: what the kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

BETA = 0.04
EPSILON = 0.2


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def log_probs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def objective(
    log_probs: Tensor, advantages: Tensor, old: Tensor, ref: Tensor, mask: Tensor
) -> Tensor:
    """Clipped policy gradient and k3 KL, the mean over the tokens of the mask."""
    ratio = torch.exp(log_probs - old)
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    delta = ref - log_probs
    loss = loss + BETA * (torch.exp(delta) - delta - 1)
    return (loss * mask).sum() / mask.sum()


def loss(logits: Tensor, labels: Tensor, *tokens: Tensor) -> Tensor:
    return objective(log_probs(logits, labels), *tokens)


def linear_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return log_probs(hidden @ weight.T, labels)


def linear_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *tokens: Tensor) -> Tensor:
    return loss(hidden @ weight.T, labels, *tokens)


def linear_loss_of_selected(
    hidden: Tensor, weight: Tensor, labels: Tensor, *tokens: Tensor
) -> Tensor:
    """As a careful author would: only the trained rows reach the head."""
    mask = tokens[-1]
    selected = [x[mask] for x in (labels, *tokens)]
    return linear_loss(hidden[mask], weight, *selected)
