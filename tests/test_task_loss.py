"""The loss of a step over a task's batches, in halves, and RoZO's trust region on it."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")

from zoengine import EvaluationError, config
from zoengine.trainer import run as runs
from zoengine.trainer.task_loss import TaskLoss


class Sum:
    """A task whose items are numbers and whose loss is their value."""

    def loss_sum(self, model, batch):
        assert len(batch["x"]) == len(batch["labels"])
        return batch["x"].sum(), len(batch["labels"])


def batch(*values):
    return {"x": torch.tensor(values), "labels": torch.zeros(len(values))}


def test_the_mean_over_unequal_batches():
    assert TaskLoss(Sum(), None, [batch(1.0, 2.0), batch(6.0)])() == 3


@pytest.mark.parametrize(
    ("batches", "halves"),
    [
        ([batch(1.0, 2.0, 3.0, 6.0)], (1.5, 4.5)),
        ([batch(1.0, 2.0, 3.0)], (1.0, 2.5)),
        ([batch(1.0, 2.0), batch(3.0, 4.0), batch(5.0, 9.0)], (3.0, 5.0)),
        ([batch(1.0), batch(3.0, 4.0)], (1.0, 3.5)),
    ],
)
def test_halves(batches, halves):
    assert tuple(half().item() for half in TaskLoss(Sum(), None, batches).halves) == halves


@pytest.mark.parametrize("bad", [batch(1.0), {"x": torch.zeros(4), "labels": torch.zeros(2)}])
def test_what_has_no_halves(bad):
    with pytest.raises(EvaluationError, match="has no halves; accumulate an even number of micro-batches"):
        _ = TaskLoss(Sum(), None, [bad]).halves


@pytest.mark.usefixtures("one_thread")
def test_a_run_with_a_trust_region(tiny_run, tmp_path):
    values = copy.deepcopy(tiny_run)
    values["method"] = {"name": "rozo", "lr": 1e-2, "tr_mode": "halves", "tr_window": 1}
    values["tuning"] = {"kind": "lora", "lora_r": 4}
    values["run"] |= {"output_dir": str(tmp_path / "run"), "steps": 3, "save_every": 3}
    result = runs.train(config.check(values))
    assert result.forward_passes == 6
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "optimizer.json").read_text())["zoengine"]
    assert state["memory"]["trust_region"]["agreement"] != 0.65
