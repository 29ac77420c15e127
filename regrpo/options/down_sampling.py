"""Variance-maximising down-sampling: sample N trajectories a state, train on K.

"Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy
Optimization" (D3S, arXiv 2509.22115), its sample level, inside each group:

    argmax over subsets S, |S| = K, of Var({A_i : i in S})

The best subset is some number of the highest and the rest of the lowest ("Not All Rollouts are
Useful", arXiv 2504.13818), so K + 1 subsets of the sorted values are compared. As in D3S, the
advantages are those of all N, whose mean is the better baseline.

Left out: the token level (|A| times entropy) and the schedule of K.
"""

import statistics
from collections.abc import Sequence


def max_variance_subset(values: Sequence[float], keep: int) -> list[int]:
    """Indices, ascending, of the ``keep`` values of greatest variance; all if there are no more.

    On a tie the subset with fewer of the highest is taken, and of equal values the earlier ones.
    """
    if len(values) <= keep:
        return list(range(len(values)))
    order = sorted(range(len(values)), key=lambda i: values[i])
    subsets = [order[: keep - top] + order[len(order) - top :] for top in range(keep + 1)]
    return sorted(max(subsets, key=lambda s: statistics.pvariance([values[i] for i in s])))
