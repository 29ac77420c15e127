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


def pytest_collection_modifyitems(items):
    """No test may pass because it holds the peer's own function."""
    for item in items:
        for _, name in REPLACED:
            held = getattr(item.module, name, None)
            assert held is None or held is getattr(liger, name), f"{item.nodeid}: {name}"
