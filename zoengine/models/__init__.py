"""Models to train and the ways of training them. Needs `pip install zoengine[hf]`."""

from zoengine.models.loading import ModelError, load, pick_dtype, save

__all__ = ["ModelError", "load", "pick_dtype", "save"]
