"""What a run trains on: text in, a scalar loss and a metric out. Needs torch; a tokenizer is handed in."""

from zoengine.tasks.base import Task
from zoengine.tasks.classification import Classification
from zoengine.tasks.completions import Completions
from zoengine.tasks.generation import Generation
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.labelled import LabelledTexts
from zoengine.tasks.masked import MaskedPrompt
from zoengine.tasks.multiple_choice import MultipleChoice
from zoengine.tasks.objectives import MetricObjective, RewardObjective, resolve
from zoengine.tasks.option_likelihood import OptionLikelihood
from zoengine.tasks.similarity import LabelSimilarity

__all__ = [
    "Classification", "Completions", "Generation", "Instance", "LabelSimilarity", "LabelledTexts", "MaskedPrompt",
    "MetricObjective", "MultipleChoice", "OptionLikelihood", "RewardObjective", "Task", "TaskError", "resolve",
]  # fmt: skip
