"""Transforms: what a method's directions are made of, and how one pass over the arena carries them out.

A method picks one; the evaluation modes use it without knowing which. A new transform is a class with the methods of
:class:`Dense`.
"""

from zoengine.transforms.dense import Dense, Diagonal, Masked, Scaled
from zoengine.transforms.kron import Kron
from zoengine.transforms.kron_tiled import KronTiled
from zoengine.transforms.lowrank import LowRank, Lozo, Subspace, is_adapter, square_shape
from zoengine.transforms.states import States
from zoengine.transforms.structured import Part, Structured, matrix_shape

__all__ = [
    "Dense",
    "Diagonal",
    "Kron",
    "KronTiled",
    "LowRank",
    "Lozo",
    "Masked",
    "Part",
    "Scaled",
    "States",
    "Structured",
    "Subspace",
    "is_adapter",
    "matrix_shape",
    "square_shape",
]
