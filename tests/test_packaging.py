"""The installed package: source archive to wheel to a fresh environment, away from the repository."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "runs", "demo-run", "tests", "bench"
)

# Run inside the fresh environment, from another folder.
CHECK = """
import sys, torch, zoengine, zoengine.kernels
from zoengine.ops import backends, noise_fill
prefix, extension, fake = sys.argv[1:]
assert zoengine.__file__.startswith(prefix), zoengine.__file__
assert zoengine.kernels.__file__.startswith(prefix), zoengine.kernels.__file__
assert backends()["cpp"].available == (extension == "built"), backends()["cpp"]
assert extension == "built" or "--no-build-isolation" in backends()["cpp"].reason
assert abs(noise_fill(4096, 1).std().item() - 1) < 0.05
try:
    import kernels
    assert fake == "fake" and kernels.OURS is False
except ModuleNotFoundError:
    assert fake == "none"
print("checked")
"""


def run(*command, cwd, **environment):
    """Output of a command; its errors are shown when it fails."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ZOENGINE_CPU_ISA")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive, made from a copy of the tree so that nothing is left in the repository."""
    copy = tmp_path_factory.mktemp("source") / "zoengine"
    shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=copy)
    (path,) = (copy / "dist").glob("*.tar.gz")
    return path


def build_wheel(archive, folder, **environment):
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-v", "-w", folder)
    output = run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel, output


def install(wheel, folder):
    """A fresh environment with the wheel in it, which sees this one's torch; its interpreter and site-packages."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])", cwd=folder).strip())
    # A plain path line: .pth files over there, such as an editable install of this package, are not followed.
    (site / "torch_from_outside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python, site


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    return build_wheel(archive, tmp_path_factory.mktemp("wheel"))[0]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name for name in names if name.endswith("/top_level.txt")).removesuffix("top_level.txt")
    assert zipfile.ZipFile(wheel).read(info + "top_level.txt").decode().split() == ["zoengine"]
    assert {name.split("/")[0] for name in names} == {"zoengine", info.rstrip("/")}
    assert info + "licenses/LICENSE" in names
    assert "zoengine/kernels/__init__.py" in names
    data = {f"zoengine/data/{p.relative_to(ROOT / 'zoengine/data')}" for p in (ROOT / "zoengine/data").rglob("*.*")}
    assert {name for name in data if "__pycache__" not in name} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]
    assert b"zoengine = zoengine.cli:main" in zipfile.ZipFile(wheel).read(info + "entry_points.txt")


def test_the_installed_wheel_works_away_from_the_repository(wheel, tmp_path):
    built = any(name.startswith("zoengine/_C.") for name in zipfile.ZipFile(wheel).namelist())
    python, site = install(wheel, tmp_path / "environment")
    away = tmp_path / "away"
    away.mkdir()
    extension = "built" if built else "missing"
    assert built or shutil.which("c++") is None, "the wheel lacks the extension though there is a compiler"
    assert "checked" in run(python, "-c", CHECK, site, extension, "none", cwd=away)

    fake = tmp_path / "others" / "kernels"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("OURS = False\n")
    assert "checked" in run(python, "-c", CHECK, site, extension, "fake", cwd=away, PYTHONPATH=str(fake.parent))


def test_without_a_working_compiler_there_is_a_warning_and_a_package(archive, tmp_path):
    wheel, output = build_wheel(archive, tmp_path, CXX="/bin/false", CC="/bin/false")
    assert output.count("warning: zoengine: the C++ kernels could not be built") == 1, output[-3000:]
    assert not any(name.startswith("zoengine/_C.") for name in zipfile.ZipFile(wheel).namelist())
    python, site = install(wheel, tmp_path / "environment")
    assert "checked" in run(python, "-c", CHECK, site, "missing", "none", cwd=tmp_path)


@pytest.fixture
def named(monkeypatch, tmp_path):
    """CUDA_HOME after setup.py's name_toolkit, where a script called nvcc, which says ``top``, is first on the path."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "")
    name_toolkit = runpy.run_path(str(ROOT / "setup.py"))["name_toolkit"]

    def call(top, **environment):
        script = tmp_path / "scripts" / "nvcc"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\necho '#$ TOP={top}' >&2\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.setenv(name, environment.get(name, ""))
        name_toolkit()
        return os.environ["CUDA_HOME"]

    return call


def test_the_toolkit_is_where_the_compiler_says(named, tmp_path):
    headers = tmp_path / "toolkit" / "include" / "cuda_runtime_api.h"
    top = f"{tmp_path}/toolkit/bin/.."
    headers.parent.mkdir(parents=True)
    (tmp_path / "toolkit" / "bin").mkdir()
    assert named(top) == "", "a folder without headers"
    headers.touch()
    assert named(top) == str(tmp_path / "toolkit")
    assert named(top, CUDA_HOME="/elsewhere") == "/elsewhere"
    assert named(top, CUDA_PATH="/elsewhere") == ""
