"""One ratio a segment: each reflection and each action of a trajectory apart.

After "Group Sequence Policy Optimization" (GSPO, arXiv 2507.18071), whose ratio is the geometric
mean over a whole response. Over segment s, with d_t = log pi(t) - log pi_old(t):

    r_s = exp(mean_{t in s} d_t)

Every token of s has the ratio r_s, and the gradient of its own log-probability (GSPO-token). So a
reflection is clipped by how far the policy has moved on it, whatever became of the correction.
"""

import torch


def segment_bounds(rows: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Where segments start among the trained tokens of a pack, as ``cu_seqlens`` int32 [S + 1].

    Args:
        rows: int64 [N], ascending positions of the trained tokens. They are never neighbours across
            sequences or turns: the last position of a sequence predicts nothing, and between turns
            stands an observation.
        segment_ids: int64 [T], the segment of the predicted token.
    """
    kinds = segment_ids.index_select(0, rows)
    starts = (rows.diff() != 1) | (kinds.diff() != 0)
    bounds = [rows.new_zeros(1), starts.nonzero().squeeze(1) + 1, rows.new_tensor([len(rows)])]
    return torch.cat(bounds).to(torch.int32)
