"""Models to train and the ways of training them. Needs `pip install zoengine[hf]`."""

from zoengine.models.errors import ModelError
from zoengine.models.loading import load, pick_dtype
from zoengine.models.saving import save

__all__ = ["ModelError", "load", "pick_dtype", "save"]
