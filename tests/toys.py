"""Small problems for the tests of methods, and fields with which every method gets through its stages on them."""

import math

import torch
from torch import nn

from zoengine import methods, ops
from zoengine.noise.seeds import query_seeds


class Toy:
    """A model and its closure."""

    model: nn.Module

    def __call__(self) -> torch.Tensor:
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def optimizer(self, name="mezo", **fields) -> methods.ZOOptimizer:
        given = {"lr": 1e-3, "seed": 3, **FIELDS.get(name, {}), **fields}
        optimizer = methods.create(name.partition("/")[0], self.model, **given)
        optimizer.full_closure = self
        return optimizer


class Problem(Toy):
    """A small regression: a model with matrices, vectors, tied and frozen weights."""

    def __init__(self, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        self.model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 1))
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        self.model[0].bias.requires_grad_(False)
        self.model.to(dtype)
        self.x = torch.randn(32, 20, generator=generator).to(dtype)
        self.y = self.x[:, :1] - 0.5 * self.x[:, 1:2]

    def __call__(self) -> torch.Tensor:
        return (self.model(self.x) - self.y).float().square().mean()


class Quadratic(Toy):
    """1/2 sum h_i (x_i - target)^2 over two matrices and a vector: 1,000 numbers, curvatures 1 to ``1 / condition``."""

    def __init__(self, condition=1e3) -> None:
        generator = torch.Generator().manual_seed(2)
        shapes = ((25, 30), (20, 10), (50,))
        self.model = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
        spectrum = torch.logspace(0, -math.log10(condition), 1000)[torch.randperm(1000, generator=generator)]
        parts = spectrum.split([p.numel() for p in self.model])
        self.curvature = [h.view(p.shape) for h, p in zip(parts, self.model, strict=True)]

    def __call__(self) -> torch.Tensor:
        return sum(0.5 * (h * x * x).sum() for h, x in zip(self.curvature, self.model, strict=True))


class Linear(Toy):
    """<g, theta> in float64 over a 6 x 5 matrix and a vector of 7: its gradient is g, and estimates are exact."""

    def __init__(self, *shapes) -> None:
        generator = torch.Generator().manual_seed(4)
        shapes = shapes or ((6, 5), (7,))
        self.model = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
        self.gradient = [torch.randn(p.shape, generator=generator).double() for p in self.model]

    def __call__(self) -> torch.Tensor:
        return sum((g * p.double()).sum() for g, p in zip(self.gradient, self.model, strict=True))


class Curved(Linear):
    """1/2 theta' diag(h) theta in float64, with its minimum at 0."""

    def __init__(self, *shapes) -> None:
        super().__init__(*shapes)
        self.curvature = [g.abs() + 0.1 for g in self.gradient]

    def __call__(self) -> torch.Tensor:
        return sum(0.5 * (h * p.double() ** 2).sum() for h, p in zip(self.curvature, self.model, strict=True))


class Transformer(Toy):
    """A causal transformer of two layers on sequences that count up: next-token cross-entropy over 12 tokens."""

    def __init__(self, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(7)
        self.model = _Decoder(vocabulary=12, width=16, heads=2, layers=2)
        for parameter in self.model.parameters():
            scale = 0.3 if parameter.dim() >= 2 else 0.05
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale + (parameter.dim() < 2)
        self.model.to(dtype)
        first = torch.randint(12, (8, 1), generator=generator)
        tokens = (first + torch.arange(9)) % 12
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]

    def __call__(self) -> torch.Tensor:
        logits = self.model(self.inputs)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten())


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class _Decoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embedding.weight.T


# Intervals are short, so that a run of a few steps crosses them; a rank of 2 makes the 1 x 40 matrix of Problem dense.
FIELDS = {
    "mezo-svrg": {"lr_full": 1e-3, "svrg_q": 3},
    "lozo": {"rank": 2, "step_interval": 3},
    "lozo-m": {"rank": 2, "step_interval": 3},
    "hizoo": {"hessian_smooth": 1e-3},
    "subzero": {"rank": 2, "update_interval": 3},
    "subzero-gv": {"rank": 2, "update_interval": 3},
    "subzero-greedy": {"rank": 2, "update_interval": 3},
    "sparse-mezo": {"sparsity": 0.5, "mask_interval": 3},
    "loren": {"n_queries": 4, "lr_cov": 0.1},
    "loren-official": {"n_queries": 4, "lr_cov": 0.1, "weight_decay": 0.1},  # a moves by its decay
    "conmezo": {"steps": 20},
    "mezo-adam/recomputed": {"moments": "recomputed", "adam_window": 3},
    "mezo-gv/history": {"gv_history": True},
    "mezo-gv/rloo": {"gv_weights": "rloo"},
    "sparse-mezo/frozen": {"mask_interval": 0},
    "sparse-mezo/every": {"mask_interval": 1},
    "lozo-m/exact": {"rank": 2, "step_interval": 3, "transport": "exact"},
    "hizoo/hess-first": {"hessian_smooth": 1e-3, "hizoo_order": "hess_then_step"},
}

# RoZO trains adapters and is tested on a model that has them.
METHODS = tuple(
    name
    for name in methods.available()
    if issubclass(methods.get(name), methods.ZOOptimizer) and not name.startswith("rozo")
)
# Variants of a method that remember something else, for the tests of saving and the like.
VARIANTS = (*METHODS, *(name for name in FIELDS if "/" in name))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict, b: dict) -> float:
    return math.sqrt(sum((a[k].double() - b[k].double()).square().sum().item() for k in a))


def directions(optimizer, step: int, query: int = 0) -> dict[str, torch.Tensor]:
    """z of a query by parameter name, from the public op."""
    seed = query_seeds(optimizer.fields.seed, step, query).direction
    return {
        s.name: ops.noise_fill(s.shape, seed, offset=s.index, noise=optimizer.fields.noise)
        for s in optimizer.arena.segments
    }


def flat(values) -> torch.Tensor:
    return torch.cat([v.detach().double().reshape(-1) for v in values])


def assert_mean(samples: torch.Tensor, expected: torch.Tensor) -> None:
    """Every element within five standard errors, and so the part along what is expected, which is far sharper."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= 5 * error + 1e-5).all()
    along = samples @ expected / expected.square().sum()
    assert abs(along.mean() - 1) < 4 * along.std() / math.sqrt(len(samples)) < 0.4
