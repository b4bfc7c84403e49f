"""SubZero: Yu et al. 2024, "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces"; and its GV and Greedy variants."""

from __future__ import annotations

import dataclasses

from zoengine.directions import Call, Step
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require
from zoengine.methods.mezo import MeZO
from zoengine.methods.mezo_gv import CandidateFields, GVFields, MeZOGreedy, MeZOGV
from zoengine.transforms import Dense, Subspace, square_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubspaceFields(Fields):
    """What the directions of SubZero need."""

    rank: int = dataclasses.field(default=64, metadata={"help": "dimension of the subspace of rows and of columns"})
    update_interval: int = dataclasses.field(default=1000, metadata={"help": "steps after which it is drawn anew"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, self, "rank", "at least 1")
        require(self.update_interval >= 1, self, "update_interval", "at least 1")


class InSubspace(ZOOptimizer):
    """Mixed into a method: its directions are P = s U Z V' in every matrix, Z (r x r) ~ N(0, 1).

    U and V are orthonormal and fixed for ``update_interval`` steps, s = sqrt(m n) / r. The printed formula omits s; the
    authors' code has it. The step within the subspace is then m n / r^2 times MeZO's, so learning rates do not carry
    over. LoRA factors and prefixes are reshaped to their most square form first. Vectors take dense directions.
    """

    transform: Subspace

    def make_transform(self) -> Dense:
        return Subspace(self.arena, self.fields.noise, self._states, self.fields.rank, square_shape)

    def run(self, step: Step) -> Run:
        if step.number % self.fields.update_interval == 0:
            yield Call(lambda: self.transform.redraw(step.seed()), prepares=True)
        return (yield from super().run(step))


class SubZero(InSubspace, MeZO):
    """MeZO with :class:`InSubspace` directions."""

    name = "subzero"
    Fields = SubspaceFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubZeroGVFields(SubspaceFields, GVFields):
    """Fields of SubZero-GV."""


class SubZeroGV(InSubspace, MeZOGV):
    """MeZO-GV with :class:`InSubspace` directions: the guide is s U (sum_i w_i Z_i) V', an r x r combination."""

    name = "subzero-gv"
    Fields = SubZeroGVFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubZeroGreedyFields(SubspaceFields, CandidateFields):
    """Fields of SubZero-Greedy."""


class SubZeroGreedy(InSubspace, MeZOGreedy):
    """MeZO-Greedy with :class:`InSubspace` directions."""

    name = "subzero-greedy"
    Fields = SubZeroGreedyFields
