"""What the trainer hands a method that measures the whole training set."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers

from zoengine import methods
from zoengine.trainer import TrainerError, ZOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Measuring(methods.MeZO):
    """MeZO that asks for the loss over all data before every step."""

    name = "measuring"
    needs_full_data = True

    def step(self, closure):
        self.full_losses = [*getattr(self, "full_losses", []), float(self.full_closure().detach())]
        return super().step(closure)


class Task:
    """A task on batches of numbers, which notes the sizes of the batches it sees."""

    def __init__(self):
        self.sizes = []

    def loss_sum(self, model, batch):
        self.sizes.append(len(batch["x"]))
        return (model(batch["x"]) - batch["labels"]).square().sum(), len(batch["x"])


def arguments(folder, **changes):
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=3, per_device_eval_batch_size=4,
        learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **changes,
    )  # fmt: skip


@pytest.fixture
def measuring(monkeypatch):
    monkeypatch.setitem(methods._METHODS, "measuring", Measuring)


def test_the_mean_over_all_items_in_order(measuring, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(2, generator=generator), "labels": torch.randn(1, generator=generator)} for _ in range(10)
    ]
    torch.manual_seed(1)
    model, task = torch.nn.Linear(2, 1), Task()
    expected = sum((model(r["x"]) - r["labels"]).square().item() for r in rows) / 10
    trainer = ZOTrainer(
        model=model, task=task, train_dataset=rows, zo_method="measuring",
        args=arguments(tmp_path, remove_unused_columns=False),
    )  # fmt: skip
    trainer.train()
    assert trainer.zo.full_closure.forwards == 3
    assert task.sizes[:3] == [4, 4, 2], "the batches of evaluation, the last one smaller"
    assert trainer.zo.full_losses[0] == pytest.approx(expected, rel=1e-6)
    assert trainer.zo.full_losses[1] != trainer.zo.full_losses[0], "at the weights of the moment"


def test_without_a_task_it_is_the_mean_over_tokens(measuring, tiny_run, tmp_path):
    """Rows with unequal numbers of labels: as one batch of everything would have it."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for k in range(7):
        ids = torch.randint(1, 16, (8,), generator=generator)
        labels = ids.clone()
        labels[2 + k % 5 :] = -100
        rows.append({"input_ids": ids, "labels": labels, "unused": k})
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_run["model"]["path"], dtype=torch.float32).eval()
    with torch.no_grad():
        whole = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
        expected = model(**whole).loss.item()
    trainer = ZOTrainer(model=model, args=arguments(tmp_path), train_dataset=rows, zo_method="measuring")
    trainer.train()
    assert trainer.zo.full_losses[0] == pytest.approx(expected, rel=1e-5)


def test_a_method_that_does_not_ask_gets_none(tmp_path):
    rows = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 4
    trainer = ZOTrainer(
        model=torch.nn.Linear(2, 1), task=Task(), train_dataset=rows,
        args=arguments(tmp_path, remove_unused_columns=False),
    )  # fmt: skip
    trainer.train()
    assert trainer.zo.full_closure is None


def test_a_stream_has_no_whole(measuring, tiny_run, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {"input_ids": torch.ones(4, dtype=torch.int64), "labels": torch.ones(4, dtype=torch.int64)}

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_run["model"]["path"], dtype=torch.float32)
    trainer = ZOTrainer(model=model, args=arguments(tmp_path), train_dataset=Stream(), zo_method="measuring")
    with pytest.raises(TrainerError, match="measuring measures the whole training set"):
        trainer.train()
