"""The full training step: forwards alone, the loop people use today, and ours, interleaved in one run.

Every contestant has its own copy of the model and runs the same forward: B prompts of L tokens, the loss over two label
words at the last position. What a step takes beyond its two forwards is its overhead.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import baselines, cases, rows
from bench.progress import Progress, say
from bench.timing import Samples, once
from zoengine import methods

DEFAULT_ROUNDS = 3
EPS, LR = 1e-3, 1e-6

# Shapes of LlamaConfig. The first is SmolLM2-135M's; its weights are random where the model is not installed.
MODELS: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
}  # fmt: skip

CONTESTANTS = (("mezo", "inplace"), ("mezo", "shadow"), ("mezo-momentum", "inplace"), ("mezo-momentum", "shadow"))


def load_model(name: str, dtype: str, device: torch.device, real: bool = True) -> nn.Module:
    """The model in evaluation mode; real weights of SmolLM2-135M if they are installed and wanted, else random ones.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from zoengine.models import load, smollm2
    from zoengine.models.errors import ModelError

    if real and name == smollm2.NAME:
        try:
            return load(name, dtype=cases.DTYPES[dtype], device=device)[0]
        except ModelError as error:
            say(f"random weights of the shape of {name}: {error}")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODELS[name], tie_word_embeddings=True))
    return model.to(device, cases.DTYPES[dtype]).eval()


def make_closure(model: nn.Module, batch: int, tokens: int) -> Callable[[], Tensor]:
    """The loss of ``batch`` random prompts of ``tokens`` tokens over two label words, as zoengine.tasks computes it."""
    from zoengine.tasks.label_logits import LabelLogits

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator).to(device)
    last = torch.full((batch,), tokens - 1, device=device)
    labels = torch.arange(batch, device=device) % 2
    logits = LabelLogits([5, 7])

    def closure() -> Tensor:
        return F.cross_entropy(logits(model, ids, last), labels)

    return closure


def default_dtypes(device: torch.device) -> list[str]:
    """fp32, and bf16 where forwards in it are not emulated."""
    from zoengine.models.loading import pick_dtype

    return ["fp32", "bf16"] if pick_dtype("auto", device) == torch.bfloat16 else ["fp32"]


def measure(
    device: torch.device,
    environment: dict[str, Any],
    *,
    dtypes: Sequence[str] | None = None,
    model_name: str = "smollm2-135m",
    batch: int = 16,
    tokens: int = 44,
    rounds: int = DEFAULT_ROUNDS,
    save: Callable[[list[rows.Row]], None] = lambda found: None,
) -> list[rows.Row]:
    """Rows of the forwards, today's loop and every contestant, for each dtype. ``save`` gets all rows so far."""
    if dtypes is None:
        dtypes = default_dtypes(device)
        if "bf16" not in dtypes:
            say("step: bf16 is emulated on this CPU, several times slower than fp32; --dtype bf16 runs it all the same")
    found: list[rows.Row] = []
    for dtype in dtypes:
        found += _measure_dtype(device, environment, dtype, model_name, batch, tokens, rounds)
        save(found)
        gc.collect()
    return found


def _measure_dtype(
    device: torch.device,
    environment: dict[str, Any],
    dtype: str,
    model_name: str,
    batch: int,
    tokens: int,
    rounds: int,
) -> list[rows.Row]:
    model = load_model(model_name, dtype, device)
    functions = _contestants(model, batch, tokens)
    forward_seconds = once(functions["forwards"]) / 2
    elements = sum(p.numel() for p in model.parameters())
    # Today's loop adds four passes of a normal and an add; ours count as half a pair of forwards each.
    z = torch.empty(min(elements, 1 << 22), dtype=cases.DTYPES[dtype], device=device)
    baselines.normal_add_(z, 0.0)
    today = 4 * once(lambda: baselines.normal_add_(z, 0.0)) * elements / z.numel()
    one_round = forward_seconds * (4 + 3 * len(CONTESTANTS)) + today
    warm_up = one_round - forward_seconds * 2
    say(
        f"step of {model_name} {dtype}, {batch} x {tokens} tokens: a forward takes {forward_seconds:.2f} s; "
        f"{rounds} rounds of {len(functions)} contestants, about {warm_up + rounds * one_round:.0f} s"
    )
    progress = Progress((1 + rounds) * len(functions))
    taken: dict[str, list[float]] = {key: [] for key in functions}
    for round_number in range(rounds + 1):
        for key, function in functions.items():
            seconds = once(function)
            if round_number:  # the first one touches fresh memory
                taken[key].append(seconds)
            progress.advance(1, f"{key} {seconds:.2f} s")
    progress.finish()
    samples = {key: Samples(tuple(seconds)) for key, seconds in taken.items()}
    options = {"model": model_name, "dtype": dtype, "batch": batch, "tokens": tokens}
    return _rows(samples, environment, options, elements)


def _contestants(model: nn.Module, batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    """What to time, by name; each works on a model of its own."""
    closure = make_closure(model, batch, tokens)
    parameters = list(model.parameters())

    def forwards() -> None:
        with torch.no_grad():
            float(closure() - closure())  # reads the losses, as a step does

    functions: dict[str, Callable[[], object]] = {
        "forwards": forwards,
        "today": lambda: baselines.mezo_step(parameters, closure, 1, lr=LR, eps=EPS),
    }
    for method, mode in CONTESTANTS:
        twin = copy.deepcopy(model)
        optimizer = methods.create(method, twin, lr=LR, zo_eps=EPS, mode=mode)
        functions[f"{method}/{mode}"] = _stepper(optimizer, make_closure(twin, batch, tokens))
    return functions


def _stepper(optimizer: methods.ZOOptimizer, closure: Callable[[], Tensor]) -> Callable[[], object]:
    def step() -> None:
        optimizer.step(closure)
        plus, minus = optimizer.last_losses
        if plus == minus:
            raise RuntimeError(
                "both losses of a step were equal, so its update was skipped and the time is not that of a step; "
                "take more --tokens or a larger --batch"
            )

    return step


def _rows(
    samples: dict[str, Samples], environment: dict[str, Any], options: dict[str, Any], elements: int
) -> list[rows.Row]:
    forwards, today = samples["forwards"], samples["today"]
    found = []
    for key, taken in samples.items():
        method, _, mode = key.partition("/")
        measures = {
            "elements": elements,
            "rounds": len(taken.seconds),
            "seconds": taken.median,
            "seconds_min": min(taken.seconds),
            "seconds_max": max(taken.seconds),
            "forwards": 2,
            "forwards_seconds": forwards.median,
            "overhead_percent": 100 * (taken.times(forwards) - 1),
            "times_faster": None if key in ("forwards", "today") else today.times(taken),
        }
        name = f"step/{options['model']}/{options['dtype']}/{key}"
        found.append(
            rows.make("step", name, {**options, "method": method, "mode": mode or None}, measures, environment)
        )
    return found
