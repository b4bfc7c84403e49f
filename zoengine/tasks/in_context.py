"""In-context learning: solved examples before each prompt, in place of training (Brown et al. 2020,
https://arxiv.org/abs/2005.14165), as the baseline of Malladi et al. 2023 (MeZO, https://arxiv.org/abs/2305.17333).

    A joy to watch. It was great

    Two hours of nothing. It was terrible

    An instant classic. It was
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from zoengine.tasks.instance import Instance, TaskError

SHOTS = 32
_SEPARATOR = "\n\n"


def with_demonstrations(
    instances: Sequence[Instance], pool: Sequence[Instance], shots: int = SHOTS, seed: int = 0
) -> list[Instance]:
    """The instances with ``shots`` solved examples of ``pool`` before each prompt, blank lines between them.

    Each instance has its own draw of the pool without replacement: one and the same set for all would make the result
    a matter of that set. An instance that is itself in the pool is never its own demonstration. The draw depends on
    ``seed``, the instance's place and the pool alone, so it is the same for every model. Where the prompt gets longer
    than a task's ``max_length``, the task cuts it on the left: the farthest demonstrations go first.

    Raises:
        TaskError: the pool has fewer other examples than ``shots``, or one without a right answer.
    """
    if shots < 0:
        raise TaskError(f"shots is {shots}; expected how many demonstrations a prompt is to have, 0 for none")
    if not all(isinstance(instance, Instance) for instance in instances):
        raise TaskError("demonstrations stand before prompts; conversations, which hold their own, take none")
    if shots == 0:
        return list(instances)
    solved = [_solved(example) for example in pool]
    generator = random.Random(seed)
    return [_demonstrated(instance, pool, solved, shots, generator) for instance in instances]


def _demonstrated(
    instance: Instance, pool: Sequence[Instance], solved: Sequence[str], shots: int, generator: random.Random
) -> Instance:
    # Only random() is promised to give the same numbers in every version of Python. Of a shuffle from the front, as
    # much is done as is needed; order[k:] are those not drawn yet.
    order = [k for k, example in enumerate(pool) if example != instance]
    if len(order) < shots:
        raise TaskError(
            f"{shots} demonstrations are asked for, and the training data has {len(order)} examples to take them from; "
            "give it more rows, or ask for fewer"
        )
    for k in range(shots):
        other = k + int(generator.random() * (len(order) - k))
        order[k], order[other] = order[other], order[k]
    parts = [*(solved[k] for k in order[:shots]), instance.prompt.strip(" ")]
    return replace(instance, prompt=_SEPARATOR.join(parts))


def _solved(example: Instance) -> str:
    """The prompt with its (first) right answer, without outer white space."""
    if not example.gold or not example.options:
        raise TaskError(f"an example without a right answer cannot be a demonstration: {example.prompt[:80]!r}")
    return (example.prompt.strip(" ") + example.options[example.gold[0]]).strip()
