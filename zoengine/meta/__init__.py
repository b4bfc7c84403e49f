"""Meta-training: learning the networks of ZO Fine-tuner (:mod:`zoengine.pertnn`) for a model, once.

>>> from zoengine.meta import MetaTrainer
>>> with MetaTrainer(model, fo_lr=1e-3, cycle_steps=100) as trainer:
...     for batch in batches:
...         trainer.step(lambda: loss(model, batch))
>>> pertnn.save(trainer.networks, "networks.safetensors")

This needs torch alone; ``zoengine meta-train`` does the same from a configuration file.
"""

from zoengine.meta.training import MetaFields, MetaTrainer

__all__ = ["MetaFields", "MetaTrainer"]
