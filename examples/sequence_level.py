"""Sequence-level ratios (GSPO): one ratio a sequence, the geometric mean of its tokens'.

    python examples/sequence_level.py

Packed sequences of different lengths. A token whose own ratio is far off is clipped at the token
level; at the sequence level it moves with its sequence.
"""

from __future__ import annotations

import torch

from regrpo_kernels import Objective, grpo_loss, token_log_probs

LENGTHS, VOCAB = (40, 7, 120, 1), 500


def main() -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    logits = torch.randn(tokens, VOCAB)
    labels = torch.randint(0, VOCAB, (tokens,))
    advantages = torch.tensor([1.0, -0.5, 0.3, -0.8])
    old = token_log_probs(logits, labels).log_probs + 0.3 * torch.randn(tokens)

    for level, low, high in (("token", 0.2, 0.2), ("sequence", 3e-3, 4e-3)):
        z = logits.clone().requires_grad_()
        out = grpo_loss(
            z,
            labels,
            advantages,
            old_log_probs=old,
            cu_seqlens=cu_seqlens,
            objective=Objective(
                ratio_level=level,
                epsilon_low=low,
                epsilon_high=high,
                loss_agg_mode="seq-mean-token-mean",
            ),
        )
        out.loss.backward()
        assert z.grad is not None
        moved = (z.grad.abs().amax(-1) > 0).split(list(LENGTHS))
        print(
            f"{level:9} loss {out.loss:.6f}, ratios {out.metrics['ratio/min']:.3f} to "
            f"{out.metrics['ratio/max']:.3f}, clipped {out.metrics['clip_ratio/region_mean']:.2f}, "
            "tokens with a gradient: " + ", ".join(f"{int(m.sum())} of {len(m)}" for m in moved)
        )


if __name__ == "__main__":
    main()
