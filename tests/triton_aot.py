"""Compile variants of the Triton kernels without a GPU and measure what came out.

``python tests/triton_aot.py`` measures every variant for sm_90 and writes the numbers of the installed Triton into
``tests/budgets/triton_sm90.json``; ``tests/test_triton_aot.py`` holds the kernels to them.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import sass
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zoengine.kernels import launch
from zoengine.kernels.add_noise import add_noise_kernel
from zoengine.kernels.kron_rows import MOST_REGISTERS, WARPS, kron_config, kron_rows_kernel, kron_score_kernel
from zoengine.kernels.lowrank_add import lowrank_add_kernel, lowrank_config
from zoengine.kernels.mask_below import mask_below_kernel
from zoengine.kernels.noise_fill import noise_fill_kernel
from zoengine.kernels.rule_step import rule_step_kernel
from zoengine.kernels.segment_histogram import segment_histogram_kernel
from zoengine.kernels.segment_noise_fill import segment_noise_fill_kernel
from zoengine.kernels.segments import BLOCK_TILES, DOT, DOT_NOISE, STATS, segment_blocks_kernel, segment_totals_kernel
from zoengine.kernels.state_fold import state_fold_kernel, tile_total_kernel

from zoengine.noise import table
from zoengine.ops.schema import RULES, TRANSFORMS

BUDGETS = Path(__file__).parent / "budgets" / "triton_sm90.json"
SM80, SM90, SM100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
THREADS = 32 * launch.WARPS
GAUSSIAN, RADEMACHER = table.GAUSSIAN, table.RADEMACHER


@dataclass(frozen=True)
class Variant:
    """A kernel, the types of its tensors (None: not given), its constexprs and the elements a thread handles.

    ``limit`` is the number of instructions an element that no version of Triton may exceed.
    """

    kernel: object
    types: dict[str, str | None]
    constants: dict[str, object]
    elements: int
    limit: float | None = None
    loop: bool = False  # count the longest loop instead of the whole way through
    registers: int | None = None  # cap
    warps: int = launch.WARPS
    registers_only: bool = True  # neither shared memory nor accesses of less than 16 bytes

    def compile(self, target: GPUTarget):
        """The compiled kernel, as the launchers launch it: pointers and group starts aligned to 16 bytes."""
        constants = self.constants | {"PTX": target.backend == "cuda"}
        constants = {name: value for name, value in constants.items() if name in self.kernel.arg_names}
        constants |= {name: None for name, kind in self.types.items() if kind is None}
        signature, attributes = {}, {}
        for k, parameter in enumerate(self.kernel.params):
            kind = self.types.get(parameter.name)
            given = kind or parameter.annotation_type
            signature[parameter.name] = "constexpr" if parameter.name in constants else given
            if kind is not None and kind.startswith("*"):
                attributes[(k,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        options = launch.compile_options(target.backend == "cuda", self.registers, self.warps)
        return triton.compile(source, target=target, options=options)


def add_noise(
    dtype="bf16", noise=GAUSSIAN, count=1, states=0, keep=False, stochastic=False, out=False, edge=False,
    transform="none", **more,
) -> Variant:  # fmt: skip
    config = launch.noise_config(noise, stochastic=stochastic, loop=count < 0)
    types = {
        "x_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}" if out else None,
        "seeds_ptr": "*i64",
        "streams_ptr": "*i64",
        "coeffs_ptr": "*fp32",
        "state0_ptr": "*fp32" if states > 0 else None,
        "state1_ptr": "*fp32" if states > 1 else None,
        "keep_ptr": "*fp32" if keep else None,
        "sr_seed_ptr": "*i64" if stochastic else None,
        "operand_ptr": {"none": None, "mask": "*u8"}.get(transform, "*fp32"),
    }
    constants = {"COUNT": count, "NOISE": noise, "TRANSFORM": TRANSFORMS[transform], "EDGE": edge}
    constants |= {"TILES": config.tiles, "ROWS": config.rows}
    return Variant(add_noise_kernel, types, constants, config.span // THREADS, registers=config.registers, **more)


def state_fold(dtype="bf16", noise=GAUSSIAN, norm=True, fused=True, stochastic=False, count=1, **more) -> Variant:
    config = launch.STATE_CONFIG
    types = {name: "*i64" for name in ("seeds_ptr", "streams_ptr")}
    types |= {name: "*fp32" for name in ("state_ptr", "coeffs_ptr", "keep_ptr")}
    types |= {name: "*fp32" if fused else None for name in ("x_coeffs_ptr", "x_keep_ptr")}
    types["x_ptr"] = f"*{dtype}" if fused else None
    types |= {"partials_ptr": "*fp64" if norm else None, "valid_ptr": "*i32" if norm else None}
    types["sr_seed_ptr"] = "*i64" if stochastic else None
    constants = {"COUNT": count, "NOISE": noise, "EDGE": False, "TILES": config.tiles, "ROWS": config.rows}
    more.setdefault("registers_only", not norm)
    return Variant(state_fold_kernel, types, constants, config.span // THREADS, **more)


def rule_step(rule, dtype="bf16", noise=GAUSSIAN, stochastic=False, count=1, **more) -> Variant:
    config = launch.STATE_CONFIG
    number, states, _ = RULES[rule]
    types = {name: "*i64" for name in ("seeds_ptr", "streams_ptr")}
    types |= {name: "*fp32" for name in ("coeffs_ptr", "scalars_ptr", "keep_ptr")}
    types |= {f"state{j}_ptr": "*fp32" if j < states else None for j in range(3)}
    types |= {"x_ptr": f"*{dtype}", "sr_seed_ptr": "*i64" if stochastic else None}
    constants = {"RULE": number, "COUNT": 2 if rule == "adamu" else count, "NOISE": noise, "EDGE": False}
    constants |= {"TILES": config.tiles, "ROWS": config.rows}
    return Variant(rule_step_kernel, types, constants, config.span // THREADS, **more)


def kron_rows(
    dtype="bf16", widest=1024, count=1, noise=GAUSSIAN, rows=True, score=False, stochastic=False, **more
) -> Variant:
    """Instructions of one row of as many tiles as it can touch, and of the search for its matrix."""
    tiles, rest = kron_config(widest, count != 1)
    types = {name: "*i64" for name in ("table_ptr", "seeds_ptr")} | {name: "*fp32" for name in ("a_ptr", "coeffs_ptr")}
    types |= {"x_ptr": f"*{dtype}" if rows else None, "out_ptr": None, "sr_seed_ptr": "*i64" if stochastic else None}
    types |= {name: "*fp32" if rows else None for name in ("kappa_ptr", "keep_ptr")}
    types |= {"partials_ptr": "*fp32" if score else None, "dots_ptr": "*fp32"}
    constants = {"COUNT": count, "NOISE": noise, "TILES": tiles, "REST": rest}
    elements = 1024 * tiles // (32 * WARPS)
    more |= {"registers": MOST_REGISTERS, "warps": WARPS, "registers_only": False}
    return Variant(kron_rows_kernel, types, constants, elements, **more)


def kron_score() -> Variant:
    types = {name: "*fp32" for name in ("score_ptr", "a_ptr", "partials_ptr", "coeffs_ptr")} | {"table_ptr": "*i64"}
    return Variant(kron_score_kernel, types, {}, 256 // THREADS, loop=True)


def lowrank_add(dtype="bf16", stochastic=False) -> Variant:
    """Instructions an element besides those of the rank: four terms of it, and one that is left over."""
    types = {name: "*fp32" for name in ("left_ptr", "right_ptr", "coeff_ptr", "keep_ptr")} | {"table_ptr": "*i64"}
    types |= {"x_ptr": f"*{dtype}", "out_ptr": None, "sr_seed_ptr": "*i64" if stochastic else None}
    registers, warps = lowrank_config(stochastic)
    elements = 64 * 64 // (32 * warps)
    return Variant(lowrank_add_kernel, types, {}, elements, registers=registers, warps=warps, registers_only=False)


def mask_below(dtype="bf16") -> Variant:
    types = {"bits_ptr": "*u8", "x_ptr": f"*{dtype}", "thresholds_ptr": "*fp32"}
    return Variant(mask_below_kernel, types, {"TILES": 4}, 4096 // THREADS, registers_only=False)


def segment_noise_fill(dtype="fp32", noise=GAUSSIAN) -> Variant:
    config = launch.STATE_CONFIG
    types = {name: "*i64" for name in ("seed_ptr", "starts_ptr", "lengths_ptr", "indices_ptr", "ends_ptr")}
    types["out_ptr"] = f"*{dtype}"
    constants = {"NOISE": noise, "TILES": config.tiles, "ROWS": config.rows}
    return Variant(segment_noise_fill_kernel, types, constants, config.span // THREADS, registers_only=False)


def segment_histogram(dtype="bf16") -> Variant:
    types = {name: "*i64" for name in ("counts_ptr", "starts_ptr", "lengths_ptr", "prefixes_ptr", "ends_ptr")}
    types["x_ptr"] = f"*{dtype}"
    constants = {"LOW": 19, "HIGH": 31, "CHUNKS": 8}
    return Variant(segment_histogram_kernel, types, constants, 2048 // THREADS, registers_only=False)


def noise_fill(dtype="bf16", noise=GAUSSIAN) -> Variant:
    config = launch.noise_config(noise)
    constants = {"NOISE": noise, "EDGE": False, "TILES": config.tiles, "ROWS": config.rows}
    types = {"out_ptr": f"*{dtype}", "seed_ptr": "*i64"}
    return Variant(noise_fill_kernel, types, constants, config.span // THREADS)


def segments(kernel, kind, noise=GAUSSIAN, dtype="bf16") -> Variant:
    types = {name: "*fp64" for name in ("result_ptr", "partials_ptr")}
    types |= {name: "*i64" for name in ("starts_ptr", "lengths_ptr", "ends_ptr")}
    types |= {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}" if kind == DOT else None}
    types["seed_ptr"] = "*i64" if kind == DOT_NOISE else None
    constants = {"KIND": kind.value, "NOISE": noise, "TILES": BLOCK_TILES}
    return Variant(kernel, types, constants, BLOCK_TILES * 1024 // THREADS, registers_only=False)


VARIANTS = {
    "add_noise bf16": add_noise(limit=38),
    "add_noise fp32": add_noise("fp32", limit=38),
    "add_noise fp16": add_noise("fp16", limit=38),
    "add_noise bf16 out of place": add_noise(out=True, limit=38),
    "add_noise bf16 loop over K": add_noise(count=-1, loop=True),
    "add_noise bf16 two states, keep": add_noise(states=2, keep=True),
    "add_noise bf16 stochastic": add_noise(stochastic=True),
    "add_noise bf16 stochastic, loop over K": add_noise(stochastic=True, count=-1),
    "add_noise fp16 stochastic": add_noise("fp16", stochastic=True),
    "add_noise bf16 rademacher": add_noise(noise=RADEMACHER, limit=14),
    "add_noise fp32 rademacher": add_noise("fp32", noise=RADEMACHER, limit=14),
    "add_noise bf16 scale": add_noise(transform="scale"),
    "add_noise bf16 mask": add_noise(transform="mask", registers_only=False),  # Triton 3.6 moves the bits
    "add_noise bf16 diag": add_noise(transform="diag"),
    "add_noise bf16 edge": add_noise(edge=True, registers_only=False),
    "state_fold fp32": state_fold(fused=False, norm=False, limit=40),
    "state_fold bf16 fused, norm": state_fold(),
    "rule_step sign bf16": rule_step("sign"),
    "rule_step adam bf16": rule_step("adam"),
    "rule_step hizoo bf16": rule_step("hizoo"),
    "kron_rows bf16": kron_rows(),
    "kron_rows bf16 score, loop over K": kron_rows(count=-1, score=True),
    "kron_rows bf16 wide": kron_rows(widest=16384),
    "kron_rows bf16 wide, score, stochastic": kron_rows(widest=16384, score=True, stochastic=True),
    "kron_rows bf16 wide, score, stochastic, loop over K": kron_rows(
        widest=16384, score=True, stochastic=True, count=-1
    ),
    "kron_score": kron_score(),
    "lowrank_add bf16": lowrank_add(),
    "mask_below bf16": mask_below(),
    "segment_noise_fill fp32": segment_noise_fill(),
    "segment_histogram bf16": segment_histogram(),
    "noise_fill bf16": noise_fill(),
    "noise_fill bf16 rademacher": noise_fill(noise=RADEMACHER),
    "tile_total": Variant(
        tile_total_kernel, {"result_ptr": "*fp64", "partials_ptr": "*fp64"}, {}, 2, loop=True, registers_only=False
    ),
    "segment_stats bf16 blocks": segments(segment_blocks_kernel, STATS),
    "segment_stats bf16 totals": segments(segment_totals_kernel, STATS),
    "segment_dot bf16 blocks": segments(segment_blocks_kernel, DOT),
    "segment_dot_noise bf16 blocks, starting inside a tile": segments(segment_blocks_kernel, DOT_NOISE),
}

# One of each kernel, to compile for other GPUs.
KERNELS = tuple({variant.kernel: name for name, variant in reversed(VARIANTS.items())}.values())


def read(compiled) -> sass.Kernel:
    """What :mod:`sass` reads from a compiled kernel for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = sass.read(file.name).values()
    return kernel


def narrow(instruction: sass.Instruction) -> bool:
    """Whether it loads or stores a single bf16 or fp16, as paths with masks do."""
    return instruction.op in ("LDG", "STG") and instruction.bits < 32


def measure(variant: Variant) -> dict[str, float]:
    """Instructions an element (see test_triton_aot), registers, bytes of local memory, accesses of shared memory."""
    kernel = read(variant.compile(SM90))
    count = len(kernel.loops()[0]) if variant.loop else kernel.path(avoid=narrow) or kernel.path()
    return {
        "instructions": round(count / variant.elements, 2),
        "registers": kernel.registers,
        "stack": kernel.stack,
        "shared_accesses": kernel.shared_accesses,
    }


def effort(compiled) -> int:
    """Accesses of tensors in memory times the square of all operations: Triton's passes take time in proportion to it.

    For every access the choice of its layout looks at all operations connected with it, from each of them.
    """
    lines = [line for line in compiled.asm["ttir"].splitlines() if re.match(r"\s*(%[\w:, %]+ = )?\"?[a-z]+\.", line)]
    accesses = sum(bool(re.search(r"tt\.(load|store)\b.*tensor<", line)) for line in lines)
    return accesses * len(lines) ** 2


def amd_facts(compiled) -> dict[str, int]:
    """Register counts and spills that the assembly for an AMD GPU states."""
    found = re.findall(r"\.(vgpr_count|sgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"])
    return {name: int(value) for name, value in found}


if __name__ == "__main__":
    measured = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    measured[triton.__version__] = {name: measure(variant) for name, variant in VARIANTS.items()}
    BUDGETS.parent.mkdir(exist_ok=True)
    BUDGETS.write_text(json.dumps(measured, indent=2) + "\n")
