"""ZOTrainer under transformers: its steps, its checkpoints, and runs that end early."""

import copy
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers

import zoengine
from zoengine import config
from zoengine.evaluation import NonFiniteLossError
from zoengine.trainer import CheckpointError, TrainerError, ZOTrainer, is_complete, last_complete
from zoengine.trainer import run as runs
from zoengine.trainer.metrics import read_rows
from zoengine.trainer.sampler import LengthGroupedSampler

pytestmark = pytest.mark.usefixtures("one_thread")


def values(tiny_run, folder, **overrides):
    """Configuration values with ``section__key=value`` changed."""
    result = copy.deepcopy(tiny_run)
    result["run"]["output_dir"] = str(folder)
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        result.setdefault(section, {})[key] = value
    return result


def arguments(folder, **changes):
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 5, "per_device_train_batch_size": 3, "learning_rate": 1e-2,
            "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 11, **changes,
        }
    )  # fmt: skip


def tiny_model(tiny_run, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_run["model"]["path"], dtype=dtype)


def sentences(count=14):
    """Sequences of unequal length, padded in their labels alone, so that micro-batches have unequal token counts."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for k in range(count):
        ids = torch.randint(1, 16, (9,), generator=generator)
        labels = ids.clone()
        labels[3 + k % 6 :] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- the step ---------------------------------------------------------------------------------------------------------


def test_every_step_is_the_optimizers_own_with_the_schedulers_lr(tiny_run, tmp_path):
    """The run equals a plain loop over the same batches, with the warmup-and-decay lr of each step."""
    args = arguments(tmp_path, lr_scheduler_type="linear", warmup_steps=2, logging_steps=1)
    seen = []

    def collate(rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        seen.append(batch)
        return batch

    model = tiny_model(tiny_run)
    trainer = ZOTrainer(model=model, args=args, train_dataset=sentences(), data_collator=collate)
    assert trainer.train().global_step == 5
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3])

    other = tiny_model(tiny_run).eval()
    optimizer = zoengine.MeZO(other, lr=0.0, seed=11)
    for batch, rate in zip(seen, rates, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(lambda batch=batch: other(**batch).loss)
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("normalises", [True, False])
def test_accumulated_batches_give_the_step_of_the_whole_batch(tiny_run, tmp_path, normalises):
    """Micro-batches of unequal token counts: one step, of the mean over all tokens, whoever takes the mean."""
    results, passes = [], []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = tiny_model(tiny_run)
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=3,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = ZOTrainer(model=model, args=args, train_dataset=sentences(12))
        assert trainer.model_accepts_loss_kwargs
        trainer.model_accepts_loss_kwargs = normalises
        trainer.train()
        results.append(flat(model))
        passes.append(trainer.zo.forward_passes)
    assert passes == [6, 6, 6]
    moved = (results[0] - flat(tiny_model(tiny_run))).norm()
    for result in results[1:]:
        assert (result - results[0]).norm() < 1e-3 * moved


def test_a_task_supplies_loss_and_evaluation(tiny_run, tmp_path):
    class Task:
        def __init__(self):
            self.counts = []

        def loss_sum(self, model, batch):
            self.counts.append(len(batch["labels"]))
            return (model(batch["input_ids"]).logits[:, -1].float() ** 2).sum(), len(batch["labels"])

        def evaluate(self, model, examples, batch_size=32):
            return {"accuracy": 0.25, "loss": float(len(examples)), "n": len(examples)}

    task, rows = Task(), sentences(5)
    trainer = ZOTrainer(
        model=tiny_model(tiny_run), task=task, train_dataset=rows, eval_dataset=rows,
        args=arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1, remove_unused_columns=False),
    )  # fmt: skip
    trainer.train()
    assert task.counts == [3, 2, 3, 2], "both micro-batches in each of the two forward passes"
    metrics = trainer.evaluate()
    assert (metrics["eval_accuracy"], metrics["eval_loss"]) == (0.25, 5.0)
    assert trainer.state.log_history[-1]["forward_passes"] == 2


def test_evaluation_without_a_task_is_trainers_own(tiny_run, tmp_path):
    rows = sentences(4)
    trainer = ZOTrainer(model=tiny_model(tiny_run), args=arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    expected = transformers.Trainer(model=tiny_model(tiny_run), args=arguments(tmp_path), eval_dataset=rows).evaluate()
    assert trainer.evaluate()["eval_loss"] == expected["eval_loss"]


def test_what_zotrainer_refuses(tiny_run, tmp_path):
    model, rows = tiny_model(tiny_run), sentences()
    with pytest.raises(zoengine.FieldError, match="zo_eps"):
        ZOTrainer(model=model, args=arguments(tmp_path), train_dataset=rows, zo_fields={"zo_epps": 1})
    with pytest.raises(zoengine.FieldError, match="mezo"):
        ZOTrainer(model=model, args=arguments(tmp_path), train_dataset=rows, zo_method="mzo")
    with pytest.raises(TrainerError, match="optimizer"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ZOTrainer(model=model, args=arguments(tmp_path), train_dataset=rows, optimizers=(optimizer, None))
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(TrainerError, match="fp16"):
        ZOTrainer(model=model, args=args, train_dataset=rows)


def test_the_callers_arguments_stay_as_they_were(tiny_run, tmp_path):
    args = arguments(tmp_path)
    before = args.to_dict()
    ZOTrainer(model=tiny_model(tiny_run), args=args, train_dataset=sentences())
    assert args.to_dict() == before


def test_length_grouped_order():
    lengths = [7, 1, 5, 3, 2, 9, 8, 4, 6, 3, 1] * 10
    sampler = LengthGroupedSampler(lengths, batch_size=4, seed=5)
    first, again = list(sampler), list(sampler)
    assert sorted(first) == list(range(110)) and first == again
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    spread = [max(b) - min(b) for b in ([lengths[i] for i in first[k : k + 4]] for k in range(0, 108, 4))]
    assert sum(spread) / len(spread) < 1.5
    starts = [lengths[first[k]] for k in range(0, 108, 4)]
    assert starts != sorted(starts), "batches are not in the order of their lengths"


# --- checkpoints ------------------------------------------------------------------------------------------------------

RUNS = {
    "full-fp32": {"run__lr_scheduler": "linear", "run__warmup_steps": 2},
    "full-bf16-momentum": {
        "model__dtype": "bfloat16", "method__name": "mezo-momentum", "run__lr_scheduler": "cosine",
        "run__gradient_accumulation": 2,
    },
    "lora-fp32-momentum": {
        "tuning__kind": "lora", "method__name": "mezo-momentum", "run__lr_scheduler": "linear",
        "run__group_by_length": True, "run__eval_every": 3,
    },
    "lora-bf16-base": {"model__dtype": "bfloat16", "tuning__kind": "lora", "method__n_queries": 2},
}  # fmt: skip


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "model").glob("*.safetensors"))
    }


def train_and_die(settings, step, where):
    """In a child process: a run that kills itself, unable to clean up, after ``step`` or while saving it."""
    torch.set_num_threads(1)

    class Killer(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step and where == "after a step":
                os.kill(os.getpid(), signal.SIGKILL)

    class Trainer(ZOTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, callbacks=[Killer()])

        def _save_rng_state(self, output_dir):
            if self.state.global_step == step and where == "while saving":
                os.kill(os.getpid(), signal.SIGKILL)
            super()._save_rng_state(output_dir)

    runs.ZOTrainer = Trainer
    runs.train(config.check(settings))


@pytest.fixture(scope="module")
def processes():
    """A context whose children start from a process that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "peft", "zoengine.trainer.run"])
    return context


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_continues_bit_for_bit(tiny_run, tmp_path, processes, name):
    settings = {"run__save_every": 2, **RUNS[name]}
    whole = runs.train(config.check(values(tiny_run, tmp_path / "whole", **settings)))
    broken = values(tiny_run, tmp_path / "broken", **settings)
    step, where, left = (7, "after a step", 6) if name.startswith("full") else (6, "while saving", 4)
    child = processes.Process(target=train_and_die, args=(broken, step, where))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert last_complete(tmp_path / "broken").name == f"checkpoint-{left}"
    assert (tmp_path / "broken" / "_incomplete").exists() == (where == "while saving")

    outcome = runs.train(config.check(broken), resume=True)
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "whole") != {}
    assert outcome.after == whole.after and outcome.before == whole.before
    assert outcome.forward_passes == whole.forward_passes
    kinds = ("step", "eval", "predictions")
    rows = [
        [{**row, "seconds": None} for row in read_rows(tmp_path / folder / "metrics.jsonl") if row["kind"] in kinds]
        for folder in ("whole", "broken")
    ]
    assert rows[0] == rows[1]
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt*")), "no pickles"


def test_a_trained_run_differs_from_its_start(tiny_run, tmp_path):
    """Guards the test above: equal hashes must mean something."""
    found = [hashes(runs.train(config.check(values(tiny_run, tmp_path / str(k), run__steps=k))).folder) for k in (1, 2)]
    assert found[0] != found[1]


@pytest.fixture
def saved(tiny_run, tmp_path):
    """A ZOTrainer run with checkpoints of steps 2 and 4, and how to build its trainer again."""

    def build(**fields):
        return ZOTrainer(
            model=tiny_model(tiny_run), train_dataset=sentences(), zo_method="mezo-momentum", zo_fields=fields,
            args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
        )  # fmt: skip

    build().train()
    return tmp_path, build


def test_only_complete_checkpoints_are_taken(saved):
    folder, build = saved
    last = folder / "checkpoint-4"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert is_complete(last) and last_complete(folder) == last
    for name in (
        "model.safetensors",
        "optimizer.safetensors",
        "optimizer.json",
        "rng_state.json",
        "trainer_state.json",
    ):
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[: len(content) // 2])
        assert not is_complete(last), f"half of {name}"
        assert last_complete(folder).name == "checkpoint-2"
        (last / name).write_bytes(content)
    (last / "model.safetensors").unlink()
    assert last_complete(folder).name == "checkpoint-2"
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        build().train(resume_from_checkpoint=str(last))


def test_resuming_from_nothing_or_another_run(saved, tmp_path_factory):
    _, build = saved
    with pytest.raises(CheckpointError, match=r"another run.*seed"):
        build(seed=12).train(resume_from_checkpoint=True)
    trainer = build()
    trainer.args.output_dir = str(tmp_path_factory.mktemp("empty"))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_no_pickle_is_loaded(saved, monkeypatch):
    _, build = saved

    def refuse(*args, **kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    trainer = build()
    trainer.args.max_steps = 5
    assert trainer.train(resume_from_checkpoint=True).global_step == 5


def test_generators_are_restored(saved):
    folder, build = saved
    trainer = build()

    def draw():
        return random.random(), np.random.rand(), np.random.normal(), torch.rand(3).tolist()

    np.random.normal()  # leaves numpy a cached second value
    trainer._save_rng_state(str(folder))
    first = draw()
    assert draw() != first
    trainer._load_rng_state(str(folder))
    assert draw() == first


def test_the_best_checkpoint_keeps_its_name(tiny_run, tmp_path):
    rows = sentences(4)
    args = arguments(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    trainer = ZOTrainer(model=tiny_model(tiny_run), args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and is_complete(best)
    state = json.loads((last_complete(tmp_path) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


# --- runs that end early ----------------------------------------------------------------------------------------------


def test_a_signal_saves_and_the_run_continues(tiny_run, tmp_path, monkeypatch):
    whole = runs.train(config.check(values(tiny_run, tmp_path / "whole", run__lr_scheduler="linear")))

    class Press(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    class Trainer(ZOTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, callbacks=[Press()])

    settings = config.check(values(tiny_run, tmp_path / "stopped", run__lr_scheduler="linear"))
    with monkeypatch.context() as patch:
        patch.setattr(runs, "ZOTrainer", Trainer)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert runs.train(settings).signal is None, "what was ignored before stays ignored, as in a background job"
        signal.signal(signal.SIGINT, signal.default_int_handler)
    shutil.rmtree(settings.run.output_dir)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "ZOTrainer", Trainer)
        outcome = runs.train(settings)
    assert (outcome.signal, outcome.step, outcome.after) == (signal.SIGINT, 5, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert runs.train(settings, resume=True).after == whole.after
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")


def test_a_non_finite_loss_leaves_the_weights(tiny_run, tmp_path):
    model = tiny_model(tiny_run)
    before = flat(model).clone()
    trainer = ZOTrainer(
        model=model, args=arguments(tmp_path), train_dataset=sentences(), zo_fields={"mode": "shadow"},
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum() * float("nan"),
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="step 0"):
        trainer.train()
    assert torch.equal(flat(model), before)


def test_a_finished_run_is_not_run_again(tiny_run, tmp_path):
    settings = values(tiny_run, tmp_path / "run", run__save_every=9)
    runs.train(config.check(settings))
    with pytest.raises(runs.RunError, match="has finished its 9 steps"):
        runs.train(config.check(settings), resume=True)
    settings["run"]["steps"] = 11
    assert runs.train(config.check(settings), resume=True).step == 11


def test_a_run_killed_after_its_last_step_is_completed(tiny_run, tmp_path):
    settings = config.check(values(tiny_run, tmp_path / "run", run__save_every=9))
    first = runs.train(settings)
    expected = hashes(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    assert runs.train(settings, resume=True).after == first.after
    assert hashes(tmp_path / "run") == expected


def test_a_resumed_run_must_be_the_same(tiny_run, tmp_path):
    runs.train(config.check(values(tiny_run, tmp_path / "run", run__save_every=3, run__lr_scheduler="linear")))
    same = {"run__lr_scheduler": "linear", "run__save_every": 5}
    with pytest.raises(runs.RunError, match=r"method\.lr, run\.batch_size"):
        other = values(tiny_run, tmp_path / "run", **same, method__lr=0.5, run__batch_size=2)
        runs.train(config.check(other), resume=True)
    with pytest.raises(runs.RunError, match="another linear schedule"):
        runs.train(config.check(values(tiny_run, tmp_path / "run", **same, run__steps=20)), resume=True)


def test_a_torn_last_row_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "run"}\n{"kind": "step", "step": 1}\n{"kind": "st')
    assert read_rows(path) == [{"kind": "run"}, {"kind": "step", "step": 1}]
