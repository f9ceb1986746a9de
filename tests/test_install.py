"""deploy/install.sh: what it would do. tests/board.sh does it, in a board's user space; tests/test_boot.py has the units on a systemd."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def steps(*arguments):
    done = subprocess.run(["bash", ROOT / "deploy" / "install.sh", *arguments, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "it listens" not in done.stdout
    return [line[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]


def one(lines, text):
    (found,) = [line for line in lines if text in line]
    return found


def test_a_dry_run_changes_nothing():
    before = [path.exists() for path in map(Path, ("/opt/edgekws", "/etc/edgekws", "/var/lib/edgekws"))]

    assert steps("--jetpack", "6")

    assert before == [path.exists() for path in map(Path, ("/opt/edgekws", "/etc/edgekws", "/var/lib/edgekws"))]


@pytest.mark.parametrize("jetpack", ["6", "7"])
def test_every_pip_step_keeps_to_the_jetpack_s_constraints(jetpack):
    pip = [line for line in steps("--jetpack", jetpack, "--torch", "https://example.org/simple") if " pip install " in line]

    assert len(pip) == 4
    assert all(f"--constraint deploy/constraints-jp{jetpack}.txt" in line for line in pip)


def test_torch_comes_from_where_it_was_told_and_stays_as_it_came():
    lines = steps("--jetpack", "6", "--torch", "https://example.org/simple")
    pip = [line for line in lines if " pip install " in line]

    assert [line.endswith("--index-url https://example.org/simple torch") for line in pip] == [False, True, True, False]
    assert " --force-reinstall --no-deps " in pip[1]  # whatever torch the system has
    assert pip[3].endswith(".\\[train\\] torch==of-that-index")
    assert one(lines, "systemctl enable --now edgekws-adapt.timer")


def test_with_a_jetpack_come_the_bindings_that_tensorrt_needs():
    assert one(steps("--jetpack", "7"), " --upgrade ").endswith(" .\\[wyoming\\,mqtt\\,metrics\\,gpu\\]")
    assert one(steps(), " --upgrade ").endswith(" .\\[wyoming\\,mqtt\\,metrics\\]")


def test_jetpack_s_own_packages_are_seen_and_none_is_changed():
    lines = steps("--jetpack", "7")

    assert one(lines, " -m venv ").endswith("--system-site-packages /opt/edgekws/venv")
    assert all(line.startswith("/opt/edgekws/venv/bin/python") for line in lines if "pip install" in line)
    assert one(lines, "numpy.__version__")


@pytest.mark.parametrize(("learns_with", "on"), [("", True), ("2.8.0", False)])
def test_an_upgrade_leaves_off_what_its_owner_turned_off(learns_with, on):
    """On an /opt of its own, where an installation was completed before."""
    script = f"""
mount -t tmpfs none /opt && mkdir -p /opt/edgekws && printf '%s' '{learns_with}' >/opt/edgekws/complete &&
bash deploy/install.sh --dry-run --jetpack 6 --torch https://example.org/simple
"""
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/opt"], capture_output=True).returncode:
        pytest.skip("no mount of its own can be made here")
    done = subprocess.run(["unshare", "--mount", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert "systemctl enable edgekws.service" not in done.stdout
    assert "systemctl try-restart edgekws.service" in done.stdout
    assert ("systemctl enable --now edgekws-adapt.timer" in done.stdout) == on  # it can learn only now


def test_uninstalling_keeps_what_was_recorded_unless_told_otherwise():
    kept, purged = steps("uninstall"), steps("uninstall", "--purge")

    assert not [line for line in kept if "/var/lib/edgekws" in line or "/etc/edgekws" in line]
    assert "/var/lib/edgekws /etc/edgekws" in one(purged, "rm -rf /var/lib")
    assert one(kept, "systemctl disable --now") and one(purged, "systemctl disable --now")


@pytest.mark.parametrize("arguments", [["--jetpack", "5"], ["--purgee"], ["--torch"]])
def test_what_it_does_not_know_is_refused(arguments):
    done = subprocess.run(["bash", ROOT / "deploy" / "install.sh", "--dry-run", *arguments], capture_output=True, text=True)

    assert done.returncode == (1 if arguments == ["--torch"] else 2)  # bash's own ${2:?}
    assert "accepted are" in done.stderr or "needs" in done.stderr
