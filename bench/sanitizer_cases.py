"""Every kernel of an implementation over small ragged inputs; scripts/gpu_suite.sh checks them.

compute-sanitizer --tool memcheck python -m bench.sanitizer_cases cuda
"""

from __future__ import annotations

import sys

import torch

from regrpo_kernels import (
    Objective,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    reflection_advantages,
    token_log_probs,
)

# a row in one block, an odd one, one of several blocks with a tail, a real vocabulary
SHAPES = [(3, 63), (5, 507), (4, 9001), (2, 32000)]


def rows(impl: str, device: str, tokens: int, vocab: int, dtype: torch.dtype) -> None:
    padded = torch.randn(2, tokens + 1, vocab, device=device).to(dtype)
    labels = torch.randint(vocab, (2, tokens), device=device)
    labels[0, 0] = -100
    token = Objective(beta=0.1, entropy_coef=0.01, softcap=30.0, delta=4.0)
    sequence = Objective(ratio_level="sequence", beta=0.1, loss_agg_mode="seq-mean-token-mean")
    for view, y, objective in (
        (padded[:, :-1], labels, token),
        (padded[0, :-1], labels[0], token),
        (padded[:, :-1], labels, sequence),
    ):
        x = view.detach().requires_grad_()
        out = token_log_probs(x, y, return_entropy=True, impl=impl)
        (out.log_probs.sum() + out.entropy.sum()).backward()
        advantages, old, ref = torch.randn(3, *y.shape, device=device)
        for inplace in (False, True):
            x = view.clone().requires_grad_()
            tokens_in = {"old_log_probs": old, "ref_log_probs": ref, "objective": objective}
            out = grpo_loss(x, y, advantages, **tokens_in, inplace=inplace, impl=impl)
            (2 * out.loss).backward()


def linear(impl: str, device: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(9, 32, device=device).to(dtype).requires_grad_()
    weight = torch.randn(507, 32, device=device).to(dtype).requires_grad_()
    labels = torch.randint(507, (9,), device=device)
    out = linear_grpo_loss(hidden, weight, labels, torch.randn(9, device=device), impl=impl)
    out.loss.backward()
    linear_token_log_probs(hidden, weight, labels, impl=impl).log_probs.sum().backward()


def advantages(impl: str, device: str) -> None:
    rewards = torch.randn(300, device=device)
    ragged = torch.randint(7, (300,), device=device)
    group_advantages(rewards, 3, scale="batch", impl=impl)
    group_advantages(rewards, ragged, baseline="leave_one_out", impl=impl)
    lengths = torch.randint(0, 40, (300,))
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    segments = torch.randint(4, (int(lengths.sum()),), dtype=torch.uint8, device=device)
    reflection_advantages(rewards > 0, segments, bounds, ragged, impl=impl)


def main(impl: str) -> None:
    device = "cpu" if impl == "cpu" else "cuda"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in SHAPES:
            rows(impl, device, *shape, dtype)
        linear(impl, device, dtype)
    advantages(impl, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{impl}: every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1])
