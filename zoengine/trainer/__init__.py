"""Training a Hugging Face model with forward passes only, inside transformers' own Trainer. Needs the extra ``hf``.

>>> from zoengine.trainer import ZOTrainer
>>> trainer = ZOTrainer(model=model, args=TrainingArguments(...), train_dataset=data, zo_method="mezo",
...                     zo_fields={"lr": 1e-6})
>>> trainer.train()
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("zoengine.trainer needs transformers: pip install 'zoengine[hf]'") from error

from zoengine.trainer.checkpoint import CheckpointError, is_complete, last_complete
from zoengine.trainer.trainer import TrainerError, ZOTrainer

__all__ = ["CheckpointError", "TrainerError", "ZOTrainer", "is_complete", "last_complete"]
