"""pytest plugin of scripts/peer_suites.sh: Liger's entry points become ours before its tests import
them.
"""

import liger_kernel.chunked_loss
import liger_kernel.chunked_loss.grpo_loss
import liger_kernel.ops.grpo_loss
import liger_kernel.transformers.grpo_loss

from regrpo_kernels.compat import liger

REPLACED = (
    (liger_kernel.transformers.grpo_loss, "triton_grpo_loss"),
    (liger_kernel.transformers.grpo_loss, "fused_selective_log_softmax"),
    (liger_kernel.ops.grpo_loss, "fused_selective_log_softmax"),
    (liger_kernel.chunked_loss, "LigerFusedLinearGRPOLoss"),
    (liger_kernel.chunked_loss.grpo_loss, "LigerFusedLinearGRPOLoss"),
)
for module, name in REPLACED:
    getattr(module, name)  # an AttributeError if the peer has moved it
    setattr(module, name, getattr(liger, name))


# Tests of Liger's internals, which nothing of ours replaces: its chunked function, its functional
# form, its reductions, a spy on its backward.
INTERNAL = (
    "test_selective_chunk_forward_matches_reference",
    "test_functional_correctness",
    "test_reduce_grpo_loss_matches_reference",
    "test_reduce_grpo_loss_requires_max_completion_length",
    "test_selective_logprob_backward_skips_frozen_params",
)


def pytest_collection_modifyitems(config, items):
    kept, left_out = [], []
    for item in items:
        options = item.callspec.params if hasattr(item, "callspec") else {}
        # Liger's reference counts the KL of padding (docs/compat.md)
        padded_kl = (
            item.originalname == "test_correctness"
            and options["loss_type"] == "luspo"
            and options["beta"] != 0
        )
        (left_out if padded_kl or item.originalname in INTERNAL else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
    for item in kept:  # none may pass because it holds the peer's own function
        for _, name in REPLACED:
            held = getattr(item.module, name, None)
            assert held is None or held is getattr(liger, name), f"{item.nodeid}: {name}"
