"""Adapters on a quantised base; and whole runs of adapters, with and without one."""

import copy
import importlib.util

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from architectures import X, logits, trained

from zoengine import config
from zoengine.methods import create
from zoengine.models import ModelError, load, save
from zoengine.trainer import run as runs
from zoengine.trainer.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(params=list(LIBRARIES))
def quantization(request):
    library = LIBRARIES[request.param]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install {library}")
    return request.param


@pytest.mark.parametrize("tuning", ["lora", "prefix"])
@pytest.mark.parametrize("head", ["lm", 2])
def test_a_quantised_base(llama, quantization, tuning, head, tmp_path):
    """Close to the plain model; adapters in 16 bit; only they are in the arena, move and are saved."""
    how = {"dtype": "bfloat16", "head": head, "tuning": tuning, "lora_target_modules": "all-linear"}
    plain, _ = load(llama, dtype="bfloat16", head=head)
    model, tokenizer = load(llama, quantization=quantization, **how)
    if tuning == "lora":
        distance = (logits(model) - logits(plain)).norm() / logits(plain).norm()
        assert 1e-3 < distance < {"int8": 0.1, "nf4": 0.8}[quantization], distance
    base = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    stored = [p for n, p in base.items() if n.endswith("q_proj.base_layer.weight") or n.endswith("q_proj.weight")]
    assert stored and all(type(p) is not torch.nn.Parameter for p in stored)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    optimizer = create("mezo", model, lr=1e-2, zo_eps=1e-2)
    assert {s.name for s in optimizer.arena.segments} == trained(model)
    assert optimizer.arena.numel == sum(p.numel() for n, p in model.named_parameters() if n not in base)
    before = logits(model)
    labels = X if head == "lm" else torch.tensor([0, 1])
    for _ in range(3):
        optimizer.step(lambda: model(input_ids=X, labels=labels).loss)
    found = logits(model)
    assert not torch.equal(found, before)
    out = save(model, tokenizer, tmp_path / "run")
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert (out / "adapter_model.safetensors").stat().st_size < 3 * optimizer.arena.numel + 10_000
    again, _ = load(llama, quantization=quantization, adapter=out, **how)
    torch.testing.assert_close(logits(again), found)
    assert {p.dtype for n, p in again.named_parameters() if "lora_" in n or "prompt_encoder" in n} == {torch.bfloat16}
    measured, _ = load(llama, quantization=quantization, **{**how, "tuning": "none"})
    assert not trained(measured) and (logits(measured) - logits(plain)).norm() < 0.8 * logits(plain).norm()


@pytest.mark.parametrize("tuning", ["full", "subset"])
def test_a_quantised_base_is_not_trained_itself(llama, tuning):
    with pytest.raises(ModelError, match=f"tuning={tuning} would perturb the weights .* int8 stores as integer codes"):
        load(llama, quantization="int8", tuning=tuning, parameters="norm")


@pytest.mark.parametrize(("name", "library"), LIBRARIES.items())
def test_a_missing_library_is_named(llama, name, library, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *a: None if module == library else find(module, *a))
    with pytest.raises(ModelError, match=f"quantization={name} needs {library}: pip install {library}"):
        load(llama, quantization=name, tuning="lora")
    with pytest.raises(ModelError, match="quantization is 'int3'; expected int8, nf4"):
        load(llama, quantization="int3", tuning="lora")


@pytest.mark.parametrize(
    "tuning",
    [
        {"kind": "prefix", "prefix_tokens": 3},
        {"kind": "prefix", "quantization": "int8"},
        {"kind": "lora", "quantization": "nf4"},
    ],
    ids=lambda tuning: "-".join(map(str, tuning.values())),
)
def test_a_resumed_run_ends_in_the_same_bits(tiny_run, tuning, tmp_path):
    """Adapters in 16 bit, too, which PEFT would read back in fp32. `zoengine eval` finds the scores of the run."""
    library = LIBRARIES.get(tuning.get("quantization"))
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install {library}")
    values = copy.deepcopy(tiny_run)
    values["tuning"] = tuning
    values["model"]["dtype"] = "bfloat16" if library else "float32"
    values["run"] |= {"steps": 4, "save_every": 2}

    def run(name, resume=False, **fields):
        values["run"] |= {"output_dir": str(tmp_path / name), **fields}
        return runs.train(config.check(values), resume=resume)

    whole = run("whole")
    run("parts", steps=2)
    run("parts", resume=True, steps=4)
    first, second = ((tmp_path / n / "model/adapter_model.safetensors").read_bytes() for n in ("whole", "parts"))
    assert first == second
    scores = evaluate(str(tmp_path / "whole"), [], "test")
    assert scores["loss"] == pytest.approx(whole.after["loss"], rel=1e-6)
