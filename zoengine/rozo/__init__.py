"""Geometry of LoRA adapters: fixed-rank matrices in factored form, for the method RoZO. Needs torch alone."""

from zoengine.rozo.manifold import FLOOR, Point, RankError, Tangent, balance, check_rank, product_svd
from zoengine.rozo.precondition import adam_, scaled
from zoengine.rozo.trust_region import TrustRegion

__all__ = [
    "FLOOR",
    "Point",
    "RankError",
    "Tangent",
    "TrustRegion",
    "adam_",
    "balance",
    "check_rank",
    "product_svd",
    "scaled",
]
