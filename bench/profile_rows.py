"""The two row kernels, once for each implementation of a GPU, for ncu; see scripts/gpu_suite.sh."""

from __future__ import annotations

import torch

from bench.cases import RowCase
from bench.rows import Batch, implementations
from regrpo_kernels import grpo_loss, token_log_probs

CASE = RowCase(8192, 151936, "bfloat16")


def main() -> None:
    batch = Batch(CASE)
    for impl in implementations():
        batch.restore()
        with torch.no_grad():
            token_log_probs(batch.logits, batch.labels, return_entropy=True, impl=impl)
        tokens = {"old_log_probs": batch.old, "ref_log_probs": batch.ref}
        grpo_loss(batch.logits, batch.labels, batch.advantages, **tokens, inplace=True, impl=impl)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
