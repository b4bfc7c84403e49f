"""What a run trains on: text in, a scalar loss and a metric out. Needs torch; a tokenizer is handed in."""

from zoengine.tasks.classification import Classification
from zoengine.tasks.labelled import LabelledTexts, TaskError
from zoengine.tasks.prompt import PromptClassification
from zoengine.tasks.similarity import LabelSimilarity

__all__ = ["Classification", "LabelSimilarity", "LabelledTexts", "PromptClassification", "TaskError"]
