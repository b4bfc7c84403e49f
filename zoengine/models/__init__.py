"""Models to train and the ways of training them. Needs `pip install zoengine[hf]`."""

from zoengine.models.card import model_card
from zoengine.models.errors import ModelError
from zoengine.models.hub import create_repo, hub_id, upload
from zoengine.models.loading import load, pick_dtype
from zoengine.models.saving import save, write_card

__all__ = ["ModelError", "create_repo", "hub_id", "load", "model_card", "pick_dtype", "save", "upload", "write_card"]
