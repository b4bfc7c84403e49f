"""What a run trains on: text in, a scalar loss and a metric out. Needs torch; a tokenizer is handed in."""

from zoengine.tasks.prompt import PromptClassification, TaskError

__all__ = ["PromptClassification", "TaskError"]
