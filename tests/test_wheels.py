"""Every extra resolves to wheels, without building anything, on the Pythons of JetPack 6 and 7 and of desktops."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Python 3.10 comes with Ubuntu 22.04 (glibc 2.35), 3.12 with 24.04 (2.39).
GLIBC_MINOR = {"3.10": 35, "3.12": 39}
# Those that there are wheels for: auditwheel's policies. pip holds each of a thousand files against each of its tags: with all from 17 on a
# third of its time is that.
MANYLINUX_MINOR = (17, 24, 26, 27, 28, 31, 34, 35, 36, 37, 38, 39)

pytestmark = pytest.mark.registry


def requirements(lines: list[str], machine: str, python: str) -> list[str]:
    """The lines that hold for that machine and Python, extras of our own unfolded. pip itself would judge markers by this host."""
    environment = {"platform_machine": machine, "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found = []
    for line in lines:
        one = Requirement(line)
        if one.marker and not one.marker.evaluate(environment):
            continue
        if one.name == "edgekws":
            found += requirements([more for extra in sorted(one.extras) for more in EXTRAS[extra]], machine, python)
        else:
            found.append(f"{one.name}{one.specifier}")
    return found


def resolve(wanted: list[str], machine: str, python: str, tmp_path: Path, *options: str) -> dict[str, str]:
    """Name → version of each wheel that pip would install there. Nothing is installed."""
    report = tmp_path / "report.json"
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in reversed(MANYLINUX_MINOR) if minor <= GLIBC_MINOR[python]]
    platforms.append(f"manylinux2014_{machine}")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--only-binary", ":all:"]
    command += ["--target", str(tmp_path / "nowhere"), "--python-version", python, "--report", str(report), *options]
    command += [part for platform in platforms for part in ("--platform", platform)]
    # Six at once take 140 s on two busy cores, and a loaded machine several times that. pip itself gives up a registry that is silent.
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, timeout=1800)

    assert done.returncode == 0, done.stderr
    return {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in json.loads(report.read_text())["install"]}


@pytest.fixture(scope="module", autouse=True)
def _registry() -> None:
    """Skips when pip finds no registry, for which a small pure package is asked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet", "--dest", "/dev/null", "tomli==999"]
    try:
        told = subprocess.run([*command, "--retries", "0", "--timeout", "10"], capture_output=True, text=True, timeout=120).stderr
    except subprocess.TimeoutExpired:
        told = ""
    # A registry that answers lists the versions it has.
    if "from versions: " not in told or "from versions: none" in told:
        pytest.skip("the package registry cannot be reached")


def everything(machine: str, python: str) -> list[str]:
    """What the package and all its extras ask for there."""
    return requirements([*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)], machine, python)


@pytest.fixture(scope="module")
def resolved(_registry, tmp_path_factory):
    """All at once, as each waits for the registry most of its time. What is made for torch is looked up alone: torch brings gigabytes."""
    constraints = {f"jp{jetpack}": ("--constraint", str(ROOT / "deploy" / f"constraints-jp{jetpack}.txt")) for jetpack in (6, 7)}
    cases = [("aarch64", "3.10", ""), ("aarch64", "3.12", ""), ("x86_64", "3.10", ""), ("x86_64", "3.12", "")]
    cases += [("aarch64", "3.10", "jp6"), ("aarch64", "3.12", "jp7")]

    def look_up(case: tuple[str, str, str]) -> tuple[dict[str, str], dict[str, str]]:
        machine, python, board = case
        wanted = [one for one in everything(machine, python) if not board or Requirement(one).name != "torch"]
        parts = ([one for one in wanted if not one.startswith("torch")], [one for one in wanted if one.startswith("torch")])
        options = constraints.get(board, ())
        folders = (tmp_path_factory.mktemp("resolved"), tmp_path_factory.mktemp("resolved"))
        return resolve(parts[0], machine, python, folders[0], *options), resolve(
            parts[1], machine, python, folders[1], *options, "--no-deps"
        )

    with ThreadPoolExecutor(len(cases)) as pool:
        yield {case: pool.submit(look_up, case) for case in cases}


@pytest.mark.parametrize("python", ["3.10", "3.12"])
@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_the_listener_and_every_extra_resolve_to_wheels(machine, python, resolved):
    """One resolution for all: they can stand in one environment."""
    found, for_torch = resolved[machine, python, ""].result()

    assert for_torch["torch"]
    assert {canonicalize_name(Requirement(one).name) for one in everything(machine, python)} - found.keys() - for_torch.keys() == set()
    assert "onnxruntime-gpu" not in found
    assert ("jetson-stats" in found) == (machine == "aarch64")
    assert ("tomli" in found) == (python == "3.10")


@pytest.mark.parametrize(("jetpack", "python"), [(6, "3.10"), (7, "3.12")])
def test_under_the_jetpack_constraints_numpy_2_is_not_pulled(jetpack, python, resolved):
    """With every extra."""
    found, for_torch = resolved["aarch64", python, f"jp{jetpack}"].result()

    assert found["numpy"].startswith("1.26.")
    assert found["cuda-bindings"].startswith({6: "12.", 7: "13.0."}[jetpack])
    assert "torch-pruning" in for_torch
    assert not {"torch", "tensorrt", "onnxruntime-gpu"} & (found.keys() | for_torch.keys())
