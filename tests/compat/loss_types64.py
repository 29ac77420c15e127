"""The loss types of TRL and Liger in fp64, from their formulas and without any code of ours."""

import math

import torch

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def log_probs64(logits, ids, temperature):
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def gamma64(advantages, log_ratios, mask, is_ratio):
    log_w = (log_ratios.clamp(-20, 20) * mask).sum(-1, keepdim=True)
    if is_ratio is not None:
        log_is = is_ratio.log().clamp(math.log(1e-8), 20.0)
        log_w = log_w + (log_is * mask if is_ratio.shape == mask.shape else log_is).sum(
            -1, keepdim=True
        )
    log_w = log_w.clamp(math.log(1e-8), 20.0)
    k = torch.where(advantages >= 0, 2.0, 3.0)
    rate = torch.where(advantages >= 0, 3.0, 2.0)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def loss64(
    log_probs,
    mask,
    advantages,
    old,
    ref,
    *,
    loss_type,
    beta=0.04,
    eps_low=0.2,
    eps_high=0.2,
    level="token",
    delta=None,
    bias_correction=False,
    is_ratio=None,
    max_length=None,
    num_items=None,
):
    """`(loss, token losses, kl, clipped)`, of `[B, L]` arguments; advantages `[B]`."""
    m = mask.double()
    a = advantages.double().unsqueeze(-1)
    old = log_probs.detach() if old is None else old.double()
    d = log_probs - old
    if level == "sequence":
        d = ((d * m).sum(-1) / m.sum(-1).clamp(min=1)).unsqueeze(-1)
    ratio = d.exp()
    clipped = torch.zeros_like(ratio)
    if loss_type == "cispo":
        token = -ratio.clamp(max=eps_high).detach() * a * log_probs
        clipped = ((ratio > eps_high) & (a > 0)).double()
    elif loss_type == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        token = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
    elif loss_type == "vespo":
        phi = gamma64(a, log_probs.detach() - old, m, is_ratio)
        token = -phi * a * log_probs
    else:
        free = ratio if delta is None else ratio.clamp(max=delta)
        token = -torch.minimum(free * a, ratio.clamp(1 - eps_low, 1 + eps_high) * a)
        clipped = ((ratio < 1 - eps_low) & (a < 0)) | ((ratio > 1 + eps_high) & (a > 0))
    if is_ratio is not None and loss_type != "vespo":
        token = token * is_ratio.double()
    kl = None
    if beta:
        x = ref.double() - log_probs
        kl = x.exp() - x - 1
        if bias_correction:
            kl = kl * ratio
        token = token + beta * kl
        kl = kl * m
    token = token * m
    batch, length = mask.shape
    if loss_type in ("grpo", "sapo"):
        loss = (token.sum(-1) / m.sum(-1).clamp(min=1)).mean()
    elif loss_type == "bnpo":
        loss = token.sum() / m.sum().clamp(min=1)
    elif loss_type == "dr_grpo":
        loss = token.sum() / (batch * (max_length or length))
    elif loss_type == "luspo":
        loss = token.sum(-1).mean()
    else:
        loss = token.sum() / (m.sum() if num_items is None else num_items)
    return loss, token, kl, clipped.double().expand_as(m) * m


def batch(batch=3, length=7, vocab=33, seed=0, hidden=None):
    """Ragged masks, one of them empty; logits `[B, L + 1, V]`, or hidden states and a head."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (batch, length), generator=g)
    mask = torch.arange(length) < torch.tensor([length, 3, 0][:batch]).unsqueeze(-1)
    found = {
        "ids": ids,
        "mask": mask.long(),
        "advantages": torch.tensor([1.3, -0.7, 0.4][:batch]),
        "is_ratio": torch.rand(batch, length, generator=g) + 0.3,
    }
    if hidden is None:
        found["logits"] = 2 * torch.randn(batch, length + 1, vocab, generator=g)
        lp = log_probs64(found["logits"][:, :-1], ids, 0.9)
    else:
        found["hidden"] = torch.randn(batch, length, hidden, generator=g)
        found["weight"] = torch.randn(vocab, hidden, generator=g)
        found["bias"] = torch.randn(vocab, generator=g)
        lp = log_probs64(found["hidden"] @ found["weight"].T + found["bias"], ids, 0.9)
    for name, scale in (("old", 0.4), ("ref", 0.3)):
        found[name] = (lp + scale * torch.randn(batch, length, generator=g)).float()
    return found
