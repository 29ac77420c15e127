"""Sequences of different lengths in packs, without padding: same loss, fewer rows.

    python examples/packed_varlen.py

`best_fit_decreasing` fills packs; `linear_grpo_loss` takes hidden states `[T, H]` and `cu_seqlens`,
and the gradients of the packs add up to that of the padded batch.
"""

from __future__ import annotations

import torch

from regrpo_kernels import Objective, best_fit_decreasing, linear_grpo_loss

HIDDEN, VOCAB, BUDGET = 64, 1000, 256


def main() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(10, 200, (24,))
    longest = int(lengths.max())
    hidden = torch.randn(len(lengths), longest, HIDDEN)
    labels = torch.randint(0, VOCAB, (len(lengths), longest))
    advantages = torch.randn(len(lengths))
    objective = Objective(loss_agg_mode="seq-mean-token-mean")

    def head() -> torch.Tensor:
        return torch.nn.init.normal_(torch.empty(VOCAB, HIDDEN), generator=generator())

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    weight = head().requires_grad_()
    mask = torch.arange(longest) < lengths.unsqueeze(-1)
    padded = linear_grpo_loss(
        hidden, weight, labels, advantages, loss_mask=mask, objective=objective
    )
    padded.loss.backward()

    packed_weight = head().requires_grad_()
    packs = best_fit_decreasing(lengths, BUDGET)
    total, rows = 0.0, 0
    for start, end in zip(packs.cu_packs[:-1], packs.cu_packs[1:], strict=True):
        members = packs.order[start:end]
        pack_lengths = lengths[members]
        cu_seqlens = torch.nn.functional.pad(pack_lengths.cumsum(0), (1, 0))
        out = linear_grpo_loss(
            torch.cat([hidden[i, : lengths[i]] for i in members]),
            packed_weight,
            torch.cat([labels[i, : lengths[i]] for i in members]),
            advantages[members],
            cu_seqlens=cu_seqlens,
            objective=objective,
            normalizer=float(len(lengths)),  # of the whole batch, so that the packs add up
        )
        out.loss.backward()
        total += out.loss.item()
        rows += int(cu_seqlens[-1])
    assert weight.grad is not None
    assert packed_weight.grad is not None
    difference = (packed_weight.grad - weight.grad).abs().max() / weight.grad.abs().max()
    print(f"padded: {mask.numel()} rows, loss {padded.loss:.6f}")
    print(f"packed: {rows} rows in {len(packs.cu_packs) - 1} packs, loss {total:.6f}")
    print(f"largest difference of the head's gradient, relative: {difference:.1e}")


if __name__ == "__main__":
    main()
