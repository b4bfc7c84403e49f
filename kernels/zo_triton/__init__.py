"""The Triton backend: one function per op of ``zoengine.ops.schema``, for NVIDIA and AMD GPUs.

With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, the same kernels run on the CPU.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"Triton cannot be imported ({error}); pip install triton") from error

from zoengine.kernels.add_noise import add_noise_, add_noise_out
from zoengine.kernels.kron_rows import kron_rows_, kron_rows_out, kron_score
from zoengine.kernels.lowrank_add import lowrank_add_, lowrank_add_out
from zoengine.kernels.mask_below import mask_below_
from zoengine.kernels.noise_fill import noise_fill_
from zoengine.kernels.rule_step import rule_step_
from zoengine.kernels.segment_histogram import segment_histogram
from zoengine.kernels.segment_noise_fill import segment_noise_fill_
from zoengine.kernels.segments import segment_dot, segment_dot_noise, segment_stats
from zoengine.kernels.state_fold import state_fold_

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
    "rule_step_",
    "segment_dot",
    "segment_dot_noise",
    "segment_histogram",
    "segment_noise_fill_",
    "segment_stats",
    "state_fold_",
]
