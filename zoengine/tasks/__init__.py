"""What a run trains on: text in, a scalar loss and a metric out. Needs torch; a tokenizer is handed in."""

from zoengine.tasks import catalog
from zoengine.tasks.base import Task
from zoengine.tasks.classification import Classification
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.labelled import LabelledTexts
from zoengine.tasks.option_likelihood import OptionLikelihood
from zoengine.tasks.similarity import LabelSimilarity

__all__ = [
    "Classification", "Instance", "LabelSimilarity", "LabelledTexts", "OptionLikelihood", "Task", "TaskError",
    "catalog",
]  # fmt: skip
