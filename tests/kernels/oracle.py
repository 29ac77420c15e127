"""fp64 oracles, written from the formulas and without any code of the package."""

import torch

# Rounding of a stored gradient, relative. Triton's interpreter truncates bf16 where a GPU rounds.
GRADIENT_RTOL = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def log_probs64(logits, labels, temperature=1.0, softcap=None):
    """`(log_probs, lse, entropy)` in fp64, differentiable; labels must be valid."""
    z = logits.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = torch.log_softmax(z, -1)  # not z - lse: next to 1e38 the sum would vanish
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return log_p.gather(-1, labels[..., None])[..., 0], torch.logsumexp(z, -1), entropy


def token_loss64(log_probs, advantages, old=None, ref=None, sequences=None, **o):
    """One loss a token, by the table in the documentation of the objective. `sequences`: the id of
    each token's sequence, for sequence-level ratios.
    """
    policy, low, high = (
        o.get("policy", "clip"),
        o.get("epsilon_low", 0.2),
        o.get("epsilon_high", 0.2),
    )
    old = log_probs.detach() if old is None else old.double()
    d = (log_probs - old).clamp(-20, 20)
    if sequences is not None:
        mean = torch.stack([d[sequences == i].mean() for i in sequences]) if len(d) else d
        d = mean.detach() + log_probs - log_probs.detach()
    ratio = d.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    a = None if advantages is None else advantages.double()
    if policy == "clip":
        cap = o.get("delta") or float("inf")
        loss = -torch.minimum(ratio.clamp(max=cap) * a, clipped * a)
    elif policy == "cispo":
        loss = -clipped.detach() * a * log_probs
    elif policy == "sapo":
        tau = torch.where(a > 0, o.get("sapo_tau_pos", 1.0), o.get("sapo_tau_neg", 1.05))
        x = tau * (ratio - 1)
        # sigmoid(x), whose slope s (1 - s) would be 0 from x = 37 on
        loss = -4 / tau * torch.where(x > 0, 1 - torch.sigmoid(-x), torch.sigmoid(x)) * a
    elif policy == "reinforce":
        loss = -a * log_probs
    else:
        loss = -log_probs
    if ref is not None and o.get("beta", 0.0):
        x = (ref.double() - log_probs).clamp(-20, 20)
        kl = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - x - 1}[o.get("kl_estimator", "k3")]
        if o.get("kl_estimator") == "k1":
            kl = x**2 / 2 + (kl - x**2 / 2).detach()
        loss = loss + o["beta"] * kl
    return loss


def grpo_loss64(logits, labels, weights, advantages=None, old=None, ref=None, sequences=None, **o):
    """`(loss, gradient of the logits)` in fp64; rows of weight 0 are left out before anything."""
    kept = weights != 0
    x = logits.detach().double().requires_grad_()
    rows = x[kept]
    pick = [None if t is None else t[kept] for t in (advantages, old, ref, sequences)]
    log_probs, _, entropy = log_probs64(
        rows, labels[kept], o.get("temperature", 1.0), o.get("softcap")
    )
    token = token_loss64(log_probs, *pick, **o) - o.get("entropy_coef", 0.0) * entropy
    loss = (token * weights[kept].double()).sum()
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), torch.zeros_like(x) if x.grad is None else x.grad


# Offsets of a row at which half a step of its lse in fp32 is 5e-4, and more.
FAR = [2.0**13, -(2.0**13), 2.0**100]


def far_logits(shape, offset, dtype):
    """`(logits, temperature)`: exact in `dtype`, within 20 steps of the offset; the temperature is
    one at which many tokens share the probability.
    """
    step = max(abs(offset) * torch.finfo(dtype).eps, 0.25)
    logits = offset + step * torch.randint(-20, 21, shape).double()
    assert torch.equal(logits.to(dtype).double(), logits)
    return logits.to(dtype), 2.5 * step


def assert_gradient(ours, exact, dtype, atol=0.0):
    """Relative to each element's rounding, plus a floor: `atol`, and 1e-6 of the largest."""
    assert ours.dtype == dtype
    if exact.numel() == 0:
        return
    error = (ours.cpu().double() - exact).abs()
    # 6e-8: half a step of fp16 subnormals
    bound = GRADIENT_RTOL[dtype] * exact.abs() + 1e-6 * exact.abs().max() + atol
    bound += 6e-8 if dtype == torch.float16 else 1e-16  # fp64 rounding, where the gradient is 0
    worst = (error - bound).flatten().argmax()
    assert (error <= bound).all(), (
        f"error {error.flatten()[worst]:.3g}, allowed {bound.flatten()[worst]:.3g}"
    )
