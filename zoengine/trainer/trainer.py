"""``ZOTrainer``: transformers' Trainer with a step that asks a closure. Hooks are overridden, the loop is Trainer's."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME, rotate_checkpoints
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import speed_metrics

from zoengine import methods
from zoengine.evaluation import Closure
from zoengine.trainer import checkpoint
from zoengine.trainer.full_data import FullLoss
from zoengine.trainer.optimizer import Method, driven, passes, unwrapped
from zoengine.trainer.progress import ZOProgressCallback
from zoengine.trainer.sampler import LengthGroupedSampler
from zoengine.trainer.task_loss import TaskLoss, mean

_log = logging.getLogger(__name__)

# A checkpoint is written below this name and then renamed. Trainer's own patterns do not see it.
_STAGING = "_incomplete"


class TrainerError(ValueError):
    """Training arguments that a zeroth-order run cannot honour."""


class Task(Protocol):
    """What a task supplies: a loss that adds up over unequal batches, and an evaluation."""

    def loss_sum(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]: ...

    def evaluate(self, model: nn.Module, examples: Any, batch_size: int = 32) -> dict[str, float]: ...


class ZOTrainer(Trainer):
    """Trainer whose optimizer needs forward passes only; the first-order baselines run in it too.

    Args:
        zo_method: name of the method, see :func:`zoengine.methods.available`.
        zo_fields: its hyperparameters. ``lr``, ``weight_decay`` and ``seed`` come from ``args`` (``learning_rate``,
            ``weight_decay``, ``seed``) unless given here.
        task: supplies loss and evaluation, see :mod:`zoengine.tasks`; without it, both are Trainer's.
        **kwargs: everything Trainer takes.

    A step is taken once per accumulated batch: its closure runs every micro-batch and divides the sum of their losses
    by the number of their items. ``args.max_grad_norm`` is not used: the first-order baselines have ``clip_norm``.
    ``save_total_limit`` is 2 unless set.

    Raises:
        FieldError: an unknown method or hyperparameter, or a bad value.
        TrainerError: several processes, fp16 with a gradient scaler, an optimizer of the caller's, or a method that
            measures the whole training set where that has no length.
    """

    def __init__(
        self,
        *,
        zo_method: str = "mezo",
        zo_fields: Mapping[str, Any] | None = None,
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        self.task = task
        self._micro_batches: list[dict[str, Any]] = []
        self._staging: Path | None = None
        self.args = kwargs["args"] = _arguments(kwargs.get("args"))
        if any(kwargs.get("optimizers", ())) or kwargs.get("optimizer_cls_and_kwargs"):
            raise TrainerError("ZOTrainer builds its optimizer itself; name it by zo_method and zo_fields")
        self._zo_class = driven(methods.get(zo_method))
        self._zo_fields = dict(zo_fields or {})
        methods.fields.build(self._zo_class.Fields, self._all_fields(), zo_method)  # bad values stop here
        super().__init__(**kwargs)
        if self.callback_handler.pop_callback(ProgressCallback) is not None:
            self.add_callback(ZOProgressCallback())

    @property
    def zo(self) -> Method | None:
        """The optimizer; None before ``train``."""
        return unwrapped(self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self._zo_class(self.model if model is None else model, **self._all_fields())
            if getattr(self._zo_class, "needs_full_data", False):
                self.optimizer.full_closure = self._full_loss()
        return self.optimizer

    def _all_fields(self) -> dict[str, Any]:
        args = self.args  # read late: a hyperparameter search changes them
        given = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        return {**given, **methods.fields.of_run(self._zo_class.Fields, args.seed, args.max_steps), **self._zo_fields}

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example["input_ids"]) for example in dataset]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.data_seed)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        # Trainer adds up what this returns, and reads the sum when it logs: on the host, so that no device is asked.
        self._tr_loss = self._tr_loss.cpu()
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros(())
        batches, self._micro_batches = self._micro_batches, []
        model.eval()
        loss = self.zo.step(self._closure(model, batches, num_items_in_batch))
        return torch.tensor(loss)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.task is None or isinstance(dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(dataset, str):  # how Trainer names one of several evaluation sets
            dataset = self.eval_dataset[dataset]
        clock = time.time()
        found = self.task.evaluate(self.model, dataset, batch_size=self.args.eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, clock, num_samples=len(dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.zo is not None:
            logs |= passes(self.zo)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's. ``resume_from_checkpoint=True`` takes the last complete checkpoint of ``args.output_dir``.

        Raises:
            CheckpointError: there is no complete checkpoint, or the one given is not complete.
            NonFiniteLossError: a loss was NaN or infinite; the weights are those from before that step.
        """
        self._micro_batches = []
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint.last_complete(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise checkpoint.CheckpointError(f"there is no complete checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint and not checkpoint.is_complete(Path(resume_from_checkpoint)):
            raise checkpoint.CheckpointError(
                f"{resume_from_checkpoint} is not a complete checkpoint of a zoengine run (safetensors weights, "
                f"{checkpoint.OPTIMIZER_JSON}, {checkpoint.RNG_JSON} and {TRAINER_STATE_NAME})"
            )
        return super().train(os.fspath(resume_from_checkpoint) if resume_from_checkpoint else None, **kwargs)

    def _closure(self, model: nn.Module, batches: list[dict[str, Any]], items: Tensor | int | None) -> Closure:
        """The loss over all of ``batches``, at whatever the weights are when it is called."""
        if self.task is not None:
            return TaskLoss(self.task, model, batches)
        # By the model or by compute_loss_func, over the whole batch; older releases have no such attribute.
        normalised = getattr(self, "loss_is_scaled_for_ga", None)
        if normalised is None:
            normalised = self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and items is not None)
        counts = [1 if normalised else self._count(batch) for batch in batches]

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                losses = [self.compute_loss(model, dict(batch), num_items_in_batch=items) for batch in batches]
            if normalised:
                return torch.stack(losses).sum()
            return mean([(loss * count, count) for loss, count in zip(losses, counts, strict=True)])

        return closure

    def _full_loss(self) -> FullLoss:
        """The loss over the training set in batches of the evaluation's size, in the order of the set."""
        if not hasattr(self.train_dataset, "__len__"):
            raise TrainerError(f"{self._zo_class.name} measures the whole training set, which must have a length")
        collate = self._get_collator_with_removed_columns(self.data_collator)

        def loss_sum(batch: dict[str, Any]) -> tuple[Tensor, Tensor | int]:
            if self.task is not None:
                return self.task.loss_sum(self.model_wrapped, batch)
            count = self._count(batch)
            loss = self._closure(self.model_wrapped, [batch], torch.as_tensor(count, device=self.args.device))()
            return loss * count, count

        return FullLoss(
            self.train_dataset, self.args.eval_batch_size, lambda rows: self._prepare_inputs(collate(rows)), loss_sum
        )

    def _count(self, batch: dict[str, Any]) -> Tensor | int:
        """How many items the mean loss of one micro-batch is over: labels that are not ignored, else rows. The number
        of labels stays on their device."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return find_batch_size(batch) or 1
        labels = labels[..., 1:] if self._loss_shifts_labels else labels
        return labels.ne(-100).sum()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """There is no gradient left to log the norm of."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write it beside its place and move it there, so that whatever bears a checkpoint's name is complete."""
        run_folder = Path(self._get_output_dir(trial))
        self._staging = run_folder / _STAGING
        try:
            shutil.rmtree(self._staging, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            (written,) = self._staging.iterdir()
            final = run_folder / written.name
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(written / TRAINER_STATE_NAME)
            if final.exists():
                final.rename(self._staging / "replaced")
            written.rename(final)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.fspath(final))
        rotate_checkpoints(
            output_dir=os.fspath(run_folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else os.fspath(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it is about to be renamed, and is pushed after that
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoint.save_optimizer(Path(output_dir), self.zo, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_optimizer(Path(folder), self.zo, self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer's, but adapters in 16 bit stay so: PEFT widens them to fp32 as it reads them."""
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtypes[name])

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.save_rng(Path(output_dir))

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_rng(Path(folder))

    def _load_scaler(self, folder: str | None) -> None:
        """Nothing: there is no gradient scaler, and its file would be a pickle."""


def _arguments(args: Any) -> Any:
    """A copy of ``args`` with what a zeroth-order run needs."""
    if args is None:
        raise TrainerError("ZOTrainer needs args=TrainingArguments(...)")
    if args.fp16:
        raise TrainerError("fp16=True scales gradients, and there are none; load the model with dtype=torch.float16")
    if args.world_size > 1:
        raise TrainerError(f"ZOTrainer runs in one process, got {args.world_size}; start it without torchrun")
    args = copy.copy(args)
    args.max_grad_norm = 0.0
    args.logging_nan_inf_filter = False
    args.data_seed = args.seed if args.data_seed is None else args.data_seed  # an order of data that can be resumed
    args.save_total_limit = 2 if args.save_total_limit is None else args.save_total_limit
    if args.n_gpu > 1:
        _log.warning("using one of %d visible GPUs", args.n_gpu)
        args._n_gpu = 1
    return args
