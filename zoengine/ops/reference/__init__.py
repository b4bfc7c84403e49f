"""Every op in plain torch: the oracle of the tests, and the backend where no kernel exists.

Written for clarity and exact agreement with the kernels, not for speed.
"""

from zoengine.ops.reference.elementwise import (
    add_noise_,
    add_noise_out,
    mask_below_,
    noise_fill_,
    round_stochastic,
    rule_step_,
    state_fold_,
)
from zoengine.ops.reference.matrices import kron_rows_, kron_rows_out, kron_score, lowrank_add_, lowrank_add_out
from zoengine.ops.reference.segments import (
    ordered_sum,
    segment_dot,
    segment_dot_noise,
    segment_histogram,
    segment_noise_fill_,
    segment_stats,
)

__all__ = [
    "add_noise_",
    "add_noise_out",
    "kron_rows_",
    "kron_rows_out",
    "kron_score",
    "lowrank_add_",
    "lowrank_add_out",
    "mask_below_",
    "noise_fill_",
    "ordered_sum",
    "round_stochastic",
    "rule_step_",
    "segment_dot",
    "segment_dot_noise",
    "segment_histogram",
    "segment_noise_fill_",
    "segment_stats",
    "state_fold_",
]
