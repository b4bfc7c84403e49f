"""The one exception of zoengine.models."""


class ModelError(ValueError):
    """A model that cannot be loaded or tuned as asked; the message says what was given and what to do."""
