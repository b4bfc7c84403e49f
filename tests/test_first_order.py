"""The first-order baselines: torch's own rules to the bit, in a step that asks a closure, and in the trainer."""

import copy
import json

import pytest
import torch
from torch import nn

import zoengine
from zoengine import EvaluationError, FieldError, NonFiniteLossError, methods

NAMES = ("ft-sgd", "ft-adamw")

pytestmark = pytest.mark.usefixtures("one_thread")


def problem():
    """(model with matrices, vectors, a frozen and an unused parameter; its closure)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))
    model[0].bias.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3, 2))
    x = torch.randn(16, 6)
    return model, lambda: (model[3](model[2](model[1](model[0](x)))) - 3 * x[:, :1]).square().mean()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_they_are_methods_like_any_other():
    assert set(NAMES) <= set(methods.available())
    assert methods.get("ft-sgd") is zoengine.FTSGD and methods.get("ft-adamw") is zoengine.FTAdamW
    for name in NAMES:
        kind = methods.get(name)
        assert (kind.forwards_per_step(kind.Fields(lr=0.1)), kind.backwards_per_step) == (1, 1)
    with pytest.raises(FieldError, match="ft-sgd has no field 'zo_eps'"):
        methods.create("ft-sgd", problem()[0], lr=0.1, zo_eps=1e-3)
    for bad in ({"beta2": 1.0}, {"adam_eps": 0.0}, {"clip_norm": -1.0}, {"lr": float("nan")}, {"seed": 2**64}):
        with pytest.raises(FieldError, match=next(iter(bad))):
            methods.create("ft-adamw", problem()[0], **{"lr": 0.1, **bad})


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_torchs_own(name):
    """Ten steps with clipping, and with decay of matrices alone, against a loop written out with torch's optimizer."""
    model, closure = problem()
    start = weights(model)
    optimizer = methods.create(name, model, lr=0.05, weight_decay=0.1, clip_norm=0.5)
    losses = [optimizer.step(closure) for _ in range(10)]
    assert (optimizer.forward_passes, optimizer.backward_passes, optimizer.step_number) == (10, 10, 10)
    assert optimizer.last_losses == losses[-1:] and losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters())

    other, closure = problem()
    matrices = [p for p in other.parameters() if p.requires_grad and p.dim() == 2]
    vectors = [p for p in other.parameters() if p.requires_grad and p.dim() == 1]
    rule = torch.optim.SGD if name == "ft-sgd" else torch.optim.AdamW
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference, clipped = rule(groups, lr=0.05), []
    for expected in losses:
        reference.zero_grad()
        loss = closure()
        assert loss.item() == expected
        loss.backward()
        other.unused.grad = torch.zeros_like(other.unused)
        clipped.append(torch.nn.utils.clip_grad_norm_(matrices + vectors, 0.5) > 0.5)
        reference.step()
    assert any(clipped) and same(weights(model), weights(other))
    assert torch.equal(model[0].bias, start["0.bias"])
    assert (model.unused < 1).all(), "decay reaches a matrix that the loss does not"


def test_clipping_can_be_switched_off():
    model, closure = problem()
    optimizer = zoengine.FTSGD(model, lr=0.1, clip_norm=0.0)
    before = weights(model)
    optimizer.step(closure)
    moved = torch.cat([(p - before[name]).flatten() for name, p in model.named_parameters()]).norm()
    assert moved > 0.1 * 1.5, "the whole gradient, whose norm is above the default limit"


@pytest.mark.parametrize("name", NAMES)
def test_saving_continues_bit_for_bit(name):
    model, closure = problem()
    optimizer = methods.create(name, model, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.step(closure)
    state, middle = copy.deepcopy(optimizer.state_dict()), weights(model)
    for _ in range(3):
        optimizer.step(closure)

    other, closure = problem()
    other.load_state_dict(middle)
    again = methods.create(name, other, lr=0.7)
    again.load_state_dict(state)
    for _ in range(3):
        again.step(closure)
    assert same(weights(model), weights(other))
    assert (again.forward_passes, again.step_number) == (6, 6)

    for wrong, words in (({"seed": 5}, "seed"), ({}, "method")):
        kind = name if wrong else next(n for n in NAMES if n != name)
        with pytest.raises(ValueError, match=words):
            methods.create(kind, other, lr=0.1, **wrong).load_state_dict(state)
    if name == "ft-adamw":
        with pytest.raises(ValueError, match="other parameters"):
            methods.create(name, nn.Linear(2, 2), lr=0.1).load_state_dict(state)


def test_parameter_groups():
    model, closure = problem()
    before = weights(model)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": list(model[3].named_parameters())}]
    zoengine.FTAdamW(groups, lr=0.1).step(closure)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"3.weight", "3.bias"}


def test_an_objective_without_a_gradient_is_refused():
    model, closure = problem()
    optimizer, before = zoengine.FTAdamW(model, lr=0.1), weights(model)
    for bad in (lambda: 0.5, lambda: closure().detach(), lambda: None):
        with pytest.raises(EvaluationError, match=r"ft-adamw needs a loss that autograd can.*zeroth-order"):
            optimizer.step(bad)
    with pytest.raises(EvaluationError, match="one loss"):
        optimizer.step(lambda: closure() * torch.ones(2))
    with torch.no_grad():
        optimizer.step(closure)  # what the caller has switched off does not matter
    assert not same(weights(model), before)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_leaves_the_weights(where):
    model, closure = problem()
    optimizer, before = zoengine.FTSGD(model, lr=0.1), weights(model)
    infinite = float("inf") if where == "loss" else 0.0
    # The root of zero has a finite value and an infinite slope.
    bad = (lambda: closure() * infinite) if where == "loss" else (lambda: (closure() * 0.0).sqrt())
    with pytest.raises(NonFiniteLossError, match=f"{where}.* in step 0"):
        optimizer.step(bad)
    assert same(weights(model), before) and optimizer.forward_passes == 0
    assert all(p.grad is None for p in model.parameters())


# --- in the trainer ---------------------------------------------------------------------------------------------------


def settings(tiny_run, folder, **method):
    values = copy.deepcopy(tiny_run)
    values["run"] |= {
        "output_dir": str(folder), "save_every": 4, "save_total_limit": 3, "lr_scheduler": "linear",
        "gradient_accumulation": 2,
    }  # fmt: skip
    values["method"] = method
    return values


@pytest.mark.parametrize(("name", "tuning"), [("ft-adamw", "lora"), ("ft-sgd", "full")])
def test_a_stopped_run_continues_bit_for_bit(tiny_run, tmp_path, name, tuning):
    pytest.importorskip("transformers")
    from zoengine import config
    from zoengine.trainer import run as runs

    outcomes, hashes = [], []
    for place in ("whole", "stopped"):
        values = settings(tiny_run, tmp_path / place, name=name, lr=0.05, weight_decay=0.01)
        values["tuning"] = {"kind": tuning}
        checked = config.check(values)
        outcomes.append(runs.train(checked))
        if place == "stopped":  # as if it had been killed after step 5: the folder of step 4 is the last
            (tmp_path / place / "result.json").unlink()
            for last in (tmp_path / place).glob("checkpoint-[89]"):
                last.rename(tmp_path / f"{place}-{last.name}")
            outcomes.append(runs.train(checked, resume=True))
        hashes.append([path.read_bytes() for path in sorted((tmp_path / place / "model").glob("*.safetensors"))])
    assert hashes[0] == hashes[1] != []
    assert outcomes[0].after == outcomes[2].after != outcomes[0].before
    assert outcomes[0].after["loss"] < outcomes[0].before["loss"]
    assert {(o.forward_passes, o.backward_passes) for o in outcomes} == {(9, 9)}
    row = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 9
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt*")), "no pickles"
    assert "9 forward passes and 9 backward" in (tmp_path / "whole" / "report.html").read_text()


def test_the_command_line_lists_them():
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from zoengine.cli.app import app

    result = CliRunner().invoke(app, ["methods", "ft-adamw"])
    assert result.exit_code == 0 and "adam_eps" in result.output and "zo_eps" not in result.output
    assert "ft-sgd" in CliRunner().invoke(app, ["methods"]).output
