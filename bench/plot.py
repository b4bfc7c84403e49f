"""``python -m bench.plot FILE... --out PNG``: the kernel rows as bars of the copy's bandwidth."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import rows
from bench.progress import say
from bench.table import kernel_label

_COLOURS = {"copy": "#999999", "normal_add": "#d08770"}
_OURS = "#4c72b0"


def draw(found: Sequence[rows.Row], path: str | Path) -> None:
    """A PNG with a panel per dtype and a bar per kernel; needs matplotlib.

    Raises:
        ValueError: there are no kernel rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = [row for row in found if row["part"] == "kernel"]
    if not kernels:
        raise ValueError("there are no kernel rows to draw; run the part kernels")
    dtypes = list(dict.fromkeys(row["options"]["dtype"] for row in kernels))
    tallest = max(sum(row["options"]["dtype"] == dtype for row in kernels) for dtype in dtypes)
    figure, axes = pyplot.subplots(
        1, len(dtypes), figsize=(6 * len(dtypes), 1 + 0.24 * tallest), squeeze=False, layout="constrained"
    )
    several = len({row["options"]["backend"] for row in kernels} - {"torch"}) > 1
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        members = [row for row in kernels if row["options"]["dtype"] == dtype]
        labels = [
            kernel_label(row).replace("`", "") + (f" [{row['options']['backend']}]" if several else "")
            for row in members
        ]
        shares = [row["measures"]["percent_of_copy"] for row in members]
        places = range(len(members), 0, -1)
        axis.barh(places, shares, color=[_COLOURS.get(row["options"]["op"], _OURS) for row in members])
        axis.set_yticks(places, labels, fontsize=7)
        axis.bar_label(axis.containers[0], [f"{share:.0f}" for share in shares], fontsize=7, padding=2)
        axis.axvline(100, color="#999999", linewidth=0.8)
        axis.set_title(dtype)
        axis.set_xlabel("% of the copy's bytes per second")
        axis.margins(y=0.01)
    figure.suptitle(f"{kernels[0]['environment']['device']}, {kernels[0]['measures']['elements']:,} elements")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Draw the files named on the command line."""
    p = argparse.ArgumentParser(prog="python -m bench.plot", description="Kernel rows as bars.")
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--out", type=Path, required=True, metavar="PNG")
    args = p.parse_args()
    draw(rows.read(args.files), args.out)
    say(f"plot: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
