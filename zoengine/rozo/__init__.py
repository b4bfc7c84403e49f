"""Geometry of LoRA adapters: fixed-rank matrices in factored form, for the method RoZO. Needs torch alone."""

from zoengine.rozo.manifold import FLOOR, Point, Tangent, balance, product_svd
from zoengine.rozo.pairs import AdapterError, Factors, Pair, Stack, find_pairs, stacks
from zoengine.rozo.precondition import adam_, scaled
from zoengine.rozo.trust_region import TrustRegion

__all__ = [
    "FLOOR",
    "AdapterError",
    "Factors",
    "Pair",
    "Point",
    "Stack",
    "Tangent",
    "TrustRegion",
    "adam_",
    "balance",
    "find_pairs",
    "product_svd",
    "scaled",
    "stacks",
]
