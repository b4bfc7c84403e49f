"""``python -m bench.gpu_check``: everything that only a GPU can show, in one command and within minutes.

Builds the package for the card that is there, runs the tests that need one, times kernels, updates and whole training
steps, and checks that nothing synchronises behind the caller's back and that every launch gives the same bits. Nothing
is installed or downloaded. Results go to DEVICE.json, DEVICE.md and PNG plots in the folder ``--out``; each part writes
as soon as it is done, and ``--part`` splits the whole over several calls that add to the same files.

Exit status: 0 when nothing failed (what did not fit into the time is named), 1 when something did, 2 for bad arguments,
4 without an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "gpu-check"
NO_GPU = 4
MINUTES = 9.0
# In the order they run, with what they weigh where time is short; what one part leaves over goes to those after it.
# Nothing runs without the build, which therefore may take three times what it should.
PARTS = {"build": 220, "tests": 120, "kernels": 80, "step": 140, "sync": 40, "safety": 70, "updates": 50}
_LEAST = 10.0  # seconds below which a part is not begun
_LOG = 400_000  # characters kept of what a part said
_FINISHING = 12.0  # kept for the last tables and plots
_OLDEST_SETUPTOOLS = 77
_WORKERS = 8  # of pytest: Triton compiles on one core each


class Budget:
    """Shares the time that is left among the parts that are left, by their weights."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds - _FINISHING

    def share(self, part: str, after: Sequence[str]) -> float:
        """Seconds for ``part`` when the parts ``after`` are still to come; the last may take all there is."""
        left = max(0.0, self._end - self._clock())
        return left * PARTS[part] / (PARTS[part] + sum(PARTS[name] for name in after))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--part", choices=(*PARTS, "all"), nargs="+", default=["all"], help="default: all")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    p.add_argument("--minutes", type=_minutes, default=MINUTES, help=f"for everything together; default {MINUTES:g}")
    p.add_argument("--commit", help="commit to write into the rows, where there is no git checkout")
    return p


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.5 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes from 0.5 to 600")
    return value


def chosen(asked: Sequence[str], built: bool) -> list[str]:
    """The parts asked for in the order they run; the build comes first where nothing is built yet."""
    wanted = set(PARTS if "all" in asked else asked) | (set() if built else {"build"})
    return [name for name in PARTS if name in wanted]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for. Returns the exit status."""
    args = parser().parse_args(arguments)
    budget = Budget(60 * args.minutes)
    device, reason = find_device()
    if device is None:
        say(f"gpu-check: {reason}")
        return NO_GPU
    from bench.gpu import report
    from bench.gpu.device import slug

    stem = args.out.resolve() / slug(device["name"])
    stem.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = report.read(stem.with_suffix(".json"), device)
    except ValueError as error:
        say(f"gpu-check: {error}")
        return 2
    say(f"gpu-check: {device['name']}, {args.minutes:g} minutes, results: {stem}.json")
    parts = chosen(args.part, built=(BUILT / "lib" / "zoengine").is_dir())
    for k, name in enumerate(parts):
        seconds, start = budget.share(name, parts[k + 1 :]), time.monotonic()
        if seconds < _LEAST:
            status, found = "left out", {"left_out": ["no time left"]}
        else:
            say(f"gpu-check: {name}, at most {seconds:.0f} s")
            status, found = RUN.get(name, measured)(name, seconds, device, args.commit)
        outcome = {
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "left_out": found.get("left_out", []),
            "facts": found.get("facts", {}),
        }
        report.merge(result, name, outcome, found)
        try:
            report.write(result, stem)
        except Exception as error:  # the JSON is there; no table is worth the measurements that are still to come
            say(f"gpu-check: the report could not be written: {type(error).__name__}: {error}")
        keep([log_file(done) for done in parts[: k + 1]], stem.with_suffix(".log"))
        say(f"gpu-check: {name}: {status}, {outcome['seconds']:.0f} s" + told(outcome))
        if name == "build" and status == "failed":
            break
    try:
        report.draw(result, stem)
    except Exception as error:  # matplotlib may be missing
        say(f"gpu-check: no plots: {type(error).__name__}: {error}")
    return int(any(result["parts"][name]["status"] == "failed" for name in parts if name in result["parts"]))


def told(outcome: dict[str, Any]) -> str:
    """What a part left out, and why it failed, for the end of its line."""
    words = [f"left out: {'; '.join(outcome['left_out'])}"] if outcome["left_out"] else []
    words += [str(outcome["facts"]["error"])] if "error" in outcome["facts"] else []
    return "".join(f"; {word}" for word in words)


def find_device() -> tuple[dict[str, Any] | None, str]:
    """What bench.gpu.device says of the GPU, or None and why there is none."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu.device"], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return None, "torch did not say within 120 s whether there is a GPU"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return None, f"torch cannot say whether there is a GPU ({last}); give its Python as GPU_PYTHON"
    return json.loads(done.stdout.splitlines()[-1]), "torch sees no NVIDIA GPU here, and everything below needs one"


def build(name: str, seconds: float, device: dict[str, Any], commit: str | None) -> tuple[str, dict]:
    """Build the package into build/gpu-check, for this card alone, and see that both GPU backends are there.

    Not in place: the Triton kernels are installed under another name than their folder has, so that a checkout alone
    is no complete package; and nothing is to be installed.
    """
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        return "failed", {"facts": {"error": f"setuptools is not installed in {sys.executable}"}}
    if int(found.split(".")[0]) < _OLDEST_SETUPTOOLS:
        error = f"setuptools {found} is too old for pyproject.toml; it takes {_OLDEST_SETUPTOOLS} or newer"
        return "failed", {"facts": {"error": error}}
    environment = {"TORCH_CUDA_ARCH_LIST": device["capability"], "MAX_JOBS": str(os.cpu_count() or 1)}
    command = [sys.executable, "setup.py", "build", "--build-lib", str(BUILT / "lib"), "--build-temp"]
    log = log_file(name)
    status = run([*command, str(BUILT / "temp")], seconds, log, cwd=ROOT, environment=environment)
    if status:
        return "failed", {"facts": {"error": why(status, log)}}
    verdict, found = measured("probe", 120, device, commit)
    facts = {**found.get("facts", {}), "arch": device["capability"]}
    missing = [
        f"{backend}: {facts.get(backend)}" for backend in ("cuda", "triton") if facts.get(backend) != "available"
    ]
    if verdict != "passed" or missing:
        facts.setdefault("error", f"not available: {'; '.join(missing)}")
        return "failed", {"facts": facts}
    return "passed", {"facts": facts}


def tests(name: str, seconds: float, device: dict[str, Any], commit: str | None) -> tuple[str, dict]:
    """The tests marked gpu; on several cores at once where pytest-xdist is there."""
    if find_spec("pytest") is None:
        return "left out", {"left_out": [f"pytest is not installed in {sys.executable}, so no test was run"]}
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    workers = min(_WORKERS, os.cpu_count() or 1)
    spread = ["-n", str(workers), "--dist", "worksteal"] if find_spec("xdist") is not None and workers > 1 else []
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)) if spread else ""}
    environment = {key: value for key, value in environment.items() if value}
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", *spread]
    log = log_file(name)
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *files]
    status = run(command, seconds, log, environment=environment)
    facts: dict[str, Any] = counted(log.read_text(errors="replace"))
    found = {"facts": facts, "left_out": []}
    if status == TIMEOUT:
        found["left_out"] = [f"the tests that were not done after {seconds:.0f} s"]
    if facts["failed"] or status not in (0, TIMEOUT) or not facts["passed"]:
        facts["error"] = (
            f"{facts['failed']} failed, {facts['passed']} passed: {', '.join(facts['names']) or why(status, log)}"
        )
        return "failed", found
    return ("partly" if found["left_out"] else "passed"), found


def counted(log: str) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and which failed, from pytest's lines so far."""
    verdicts = {}
    for line in log.splitlines():
        ahead = re.search(r"\b(PASSED|FAILED|SKIPPED|ERROR)\s+\S*?(tests/\S.*)", line)  # as pytest-xdist writes it
        behind = re.search(r"(tests/\S.*?)\s+(PASSED|FAILED|SKIPPED|ERROR)\b", line)
        if ahead or behind:
            verdict, test = ahead.groups() if ahead else reversed(behind.groups())
            verdicts[test.split(" - ")[0].strip()] = verdict
    words = list(verdicts.values())
    failed = [test for test, verdict in verdicts.items() if verdict in ("FAILED", "ERROR")]
    return {
        "passed": words.count("PASSED"),
        "failed": len(failed),
        "skipped": words.count("SKIPPED"),
        "names": failed[:20],
    }


def measured(name: str, seconds: float, device: dict[str, Any], commit: str | None) -> tuple[str, dict]:
    """A part of bench.gpu.parts, in a process of its own that is stopped when its time is over."""
    log = log_file(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bench.gpu.parts", name, "--seconds", f"{seconds:.0f}", "--out", str(out)]
        status = run([*command, *(["--commit", commit] if commit else [])], seconds, log)
        found = json.loads(out.read_text()) if out.exists() else {}
    found.setdefault("left_out", [])
    found.setdefault("facts", {})
    if status == TIMEOUT:
        found["left_out"].append(f"what was not done after {seconds:.0f} s")
    elif status:
        found["facts"]["error"] = why(status, log)
    if status not in (0, TIMEOUT) or not all(check["passed"] for check in found.get("checks", [])):
        return "failed", found
    return ("partly" if found["left_out"] else "passed"), found


RUN = {"build": build, "tests": tests}
TIMEOUT = -1000


def run(
    command: Sequence[str],
    seconds: float,
    log: Path,
    *,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> int:
    """The command's exit status, or ``TIMEOUT`` after its whole process group was ended; what it says goes to ``log``.

    It runs outside of the checkout, where ``import zoengine`` finds what was built.
    """
    BUILT.mkdir(parents=True, exist_ok=True)
    paths = [str(BUILT / "lib"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    inherited = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    inherited.setdefault("TRITON_CACHE_DIR", str(BUILT / "compiled"))
    with log.open("w") as file:
        child = subprocess.Popen(
            command, cwd=cwd or BUILT, env={**inherited, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return TIMEOUT
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def why(status: int, log: Path) -> str:
    """The last words of a command that failed or was stopped."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    how = "not done in its time" if status == TIMEOUT else f"exit status {status}"
    return f"{how}: {lines[-1][:300] if lines else 'it said nothing'}"


def log_file(name: str) -> Path:
    """Where a part's output goes at first."""
    BUILT.mkdir(parents=True, exist_ok=True)
    return BUILT / f"{name}.log"


def keep(logs: Sequence[Path], path: Path) -> None:
    """One file of what all parts said, the end of it where it is long."""
    texts = [f"== {log.stem}\n{log.read_text(errors='replace')[-_LOG:]}" for log in logs if log.exists()]
    path.write_text("\n".join(texts))


def say(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
