"""What the tests on a GPU share: how much data, and where in memory it begins."""

import torch

PROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 1
MANY = 23_000 * PROCESSORS  # elements: whole units on every multiprocessor more than once
SOME = min(300_000, MANY)


def moved(value, shift):
    """``value`` on the GPU, its tensors ``shift`` elements behind the beginning of their memory."""
    if isinstance(value, list):
        return [moved(one, shift) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty(value.numel() + shift, dtype=value.dtype, device="cuda")
    return memory[shift:].view(value.shape).copy_(value)
