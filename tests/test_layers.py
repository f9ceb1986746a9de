"""Imports point down only, vendor libraries stay in their one module, and the listener loads none of them before it needs one."""

import ast
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

import edgekws
from edgekws import bench, doctor
from edgekws.engines import Preparation
from edgekws.errors import EdgekwsError
from edgekws.model import find_model, load_model
from edgekws.training import teacher

PACKAGE = Path(edgekws.__file__).parent
# From the ground up. Those of one line do not know each other; a package (audio, engines, training) is one unit.
LAYERS = (
    ("values", "errors"),
    ("audio", "config", "detector", "frontend", "power", "pictures", "pseudo_labels", "store"),
    ("model", "voice"),
    ("engines",),
    ("enrolment", "pipeline", "sinks"),
    ("few_clients",),
    ("control", "evaluation", "metrics", "mqtt", "promotion", "web"),
    ("training",),
    ("bench", "daemon", "doctor", "report", "watch", "wyoming_server"),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
VENDORS = {
    "cuda",
    "jinja2",
    "jtop",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "paho",
    "prometheus_client",
    "pymicro_wakeword",
    "pynvml",
    "scipy",
    "sounddevice",
    "soundfile",
    "soxr",
    "tensorrt",
    "torch",
    "torch_pruning",
    "wyoming",
    "zeroconf",
}
PROCESSES = {  # of ours
    "measure": lambda model, folder: bench.listener(model, "onnxruntime", folder / "pcm").close(),
    "listen": lambda model, folder: bench._at_a_microphone(model, "onnxruntime", folder),
    "train": lambda model, folder: bench.Training(model).__enter__().__exit__(),
    "prepare": lambda model, folder: Preparation(model, "null").why_not(),
    "torch": lambda model, folder: [*doctor._torch(sys.executable)],
    "pip": lambda model, folder: teacher.fetch(folder),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file) for file in FILES}


def imports(file: Path, *, inside_functions: bool = True) -> set[str]:
    """Absolute dotted names of what a file imports; `from edgekws import x` counts as edgekws.x."""
    package = ["edgekws", *file.relative_to(PACKAGE).parent.parts]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])]) if node.level else str(node.module)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(file.read_text(), str(file)))
    return found


def own(dotted: str) -> str | None:
    """The module of ours that a dotted name lies in: "edgekws.engines.load_engine" → "engines"."""
    parts = dotted.split(".")
    if parts[0] != "edgekws":
        return None
    inner = parts[1:]
    while inner and ".".join(inner) not in MODULES:
        inner.pop()
    return ".".join(inner)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file):
    unit = name_of(file).split(".")[0]
    if not unit:  # edgekws/__init__.py
        assert not imports(file)
        return
    assert unit in RANK, f"{unit} has no place in LAYERS yet"
    targets = {target.split(".")[0] for dotted in imports(file) if (target := own(dotted))}

    assert [target for target in sorted(targets - {unit}) if RANK[target] >= RANK[unit]] == []


@pytest.mark.parametrize("file", [file for file in FILES if not name_of(file).startswith("training")], ids=name_of)
def test_a_vendor_library_is_imported_inside_functions_only(file):
    assert {dotted.split(".")[0] for dotted in imports(file, inside_functions=False)} & VENDORS == set()


@pytest.mark.parametrize("vendor", sorted(VENDORS))
def test_a_vendor_library_is_imported_by_one_module(vendor):
    """Training aside, which is a process of its own."""
    users = [name for file in FILES if vendor in {dotted.split(".")[0] for dotted in imports(file)} and (name := name_of(file))]

    assert len([user for user in users if not user.startswith("training")]) <= 1


def test_only_training_knows_torch():
    assert {name_of(file).split(".")[0] for file in FILES if "torch" in {dotted.split(".")[0] for dotted in imports(file)}} <= {"training"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_that_is_read_could_run_code(file):
    """No pickle, nor what loads one."""
    assert {dotted.split(".")[0] for dotted in imports(file)} & {"pickle", "shelve", "marshal", "dill", "joblib", "cloudpickle"} == set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
            assert name not in ("torch.load", "torch.save", "eval", "exec")
            assert name != "np.load" or keywords.get("allow_pickle") == "False"


@pytest.mark.parametrize("module", ["pipeline", "daemon", "cli"])
def test_importing_it_loads_no_vendor_library(module):
    script = f"import sys, edgekws.{module}; print(*sorted({VENDORS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


@pytest.mark.parametrize("process", PROCESSES)
def test_no_process_of_ours_runs_what_lies_in_the_current_directory(process, tmp_path, monkeypatch):
    for name in ("edgekws", "torch", "pip"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "pcm").touch()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(EdgekwsError):  # what is not installed here
        PROCESSES[process](load_model(find_model("edge-tiny")), tmp_path)

    assert not (tmp_path / "ran").exists()


def test_listening_never_reaches_training():
    """Whatever the daemon and the live view import, at any depth, inside functions too."""
    by_name = {name_of(file): file for file in FILES}
    reached, todo = set(), ["daemon", "watch"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [target for dotted in imports(by_name[name]) if (target := own(dotted))]

    assert {name for name in reached if name.startswith("training")} == set()
