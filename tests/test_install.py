"""deploy/install.sh: what it would do. tests/board.sh does it, in a board's user space; tests/test_boot.py has the units on a systemd."""

import re
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


def on_a_machine_of_its_own(script):
    """What a shell does where neither /opt, the units, state nor packages are this machine's."""
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/opt"], capture_output=True).returncode:
        pytest.skip("no mount of its own can be made here")
    mounts = "set -e; for on in /opt /var/lib /etc/systemd/system; do mount -t tmpfs none $on; done; mkdir /opt/edgekws /var/lib/edgekws\n"
    return subprocess.run(["unshare", "--mount", "bash", "-c", mounts + script], cwd=ROOT, capture_output=True, text=True)


UPGRADE = "bash deploy/install.sh --dry-run --jetpack 6 --torch https://example.org/simple"


@pytest.mark.parametrize("torch", [(), ("--torch", "https://example.org/simple")])
def test_it_learns_at_night_with_torch_and_without(torch):
    assert one(steps(*torch), "systemctl enable --now edgekws-adapt.timer")


@pytest.mark.parametrize(("learns_with", "on"), [("", True), ("2.8.0", False), ("without torch", False)])
def test_an_upgrade_leaves_off_what_its_owner_turned_off(learns_with, on):
    """Only what was installed when the timer stayed off without torch has an empty file, and an owner who never chose."""
    done = on_a_machine_of_its_own(f"printf '%s' '{learns_with}' >/opt/edgekws/complete\n{UPGRADE}")

    assert done.returncode == 0, done.stderr
    assert "systemctl enable edgekws.service" not in done.stdout
    assert "systemctl try-restart edgekws.service" in done.stdout
    assert ("systemctl enable --now edgekws-adapt.timer" in done.stdout) == on


@pytest.mark.parametrize("learns", [True, False])
def test_an_installation_that_has_run_before_completion_was_noted_is_upgraded_too(learns):
    torch = "install -D -m 755 /dev/stdin /opt/edgekws/venv/bin/python <<<$'#!/bin/sh\\necho 2.8.0'\n" if learns else ""
    done = on_a_machine_of_its_own(f"touch /etc/systemd/system/edgekws.service /var/lib/edgekws/edgekws.db\n{torch}{UPGRADE}")

    assert done.returncode == 0, done.stderr
    assert "systemctl enable edgekws.service" not in done.stdout
    assert ("systemctl enable --now edgekws-adapt.timer" in done.stdout) == (not learns)


def test_what_an_uninstallation_kept_is_no_installation():
    done = on_a_machine_of_its_own(f"touch /var/lib/edgekws/edgekws.db\n{UPGRADE}")

    assert "systemctl enable edgekws.service" in done.stdout


def test_uninstalling_keeps_what_was_recorded_unless_told_otherwise():
    kept, purged = steps("uninstall"), steps("uninstall", "--purge")

    assert not [line for line in kept if "/var/lib/edgekws" in line or "/etc/edgekws" in line]
    assert "/var/lib/edgekws /etc/edgekws" in one(purged, "rm -rf /var/lib")
    assert one(kept, "systemctl disable --now") and one(purged, "systemctl disable --now")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('root = "/srv/my recordings"', "/srv/my recordings"),
        ("store.root = '/srv/all'  # the large disk", "/srv/all"),
        ('root = "/var/lib/edgekws"', ""),
        ('# root = "/srv"', ""),
    ],
)
def test_what_was_recorded_elsewhere_is_named_before_the_settings_go(line, told):
    settings = f"mount -t tmpfs none /etc; mkdir /etc/edgekws; cat >/etc/edgekws/edgekws.toml <<'END'\n{line}\nEND\n"
    postrm = re.search(r"DEBIAN/postrm\" <<'END'\n(.*?)\nEND\n", (ROOT / "deploy" / "build-deb.sh").read_text(), re.DOTALL)[1]
    for removal in (
        "bash deploy/install.sh uninstall --purge --dry-run",
        f"export DPKG_MAINTSCRIPT_PACKAGE=edgekws; set -- remove\n{postrm}",
    ):
        done = on_a_machine_of_its_own(settings + removal)

        assert done.returncode == 0, done.stderr
        assert re.findall("left.* is in (.*), where", done.stdout) == [told] * bool(told)
        assert "/srv" not in "".join(one for one in done.stdout.splitlines() if "rm -rf" in one)


PACKAGE = "Package: edgekws\nStatus: install ok installed\nVersion: 1\nArchitecture: all\nMaintainer: none <none>\nDescription: none\n"
PACKAGED = f"mkdir /var/lib/dpkg; printf '{PACKAGE}' >/var/lib/dpkg/status\n"


def test_beside_the_package_only_what_the_script_installed_is_taken_away():
    both = on_a_machine_of_its_own(f"{PACKAGED}bash deploy/install.sh uninstall --dry-run")
    recorded = on_a_machine_of_its_own(f"{PACKAGED}bash deploy/install.sh uninstall --purge --dry-run")
    alone = on_a_machine_of_its_own(f"{PACKAGED}rmdir /opt/edgekws; bash deploy/install.sh uninstall --dry-run")

    assert both.returncode == 0, both.stderr
    assert "/opt/edgekws" in both.stdout and "the Debian package stays" in both.stdout
    assert "sysusers" not in both.stdout
    assert (recorded.returncode, alone.returncode) == (1, 1)
    assert "+" not in recorded.stdout + alone.stdout
    assert "sudo apt-get remove edgekws" in alone.stderr


@pytest.mark.parametrize(("called", "code"), [("install", 1), ("install 0.1", 1), ("upgrade 0.1", 0), ("abort-upgrade 0.2", 0)])
def test_the_package_refuses_to_come_beside_what_the_script_installed_and_to_upgrade_never(called, code):
    script = re.search(r"DEBIAN/preinst\" <<'END'\n(.*?)\nEND\n", (ROOT / "deploy" / "build-deb.sh").read_text(), re.DOTALL)[1]
    beside = on_a_machine_of_its_own(f"mkdir /opt/edgekws/venv; set -- {called}\n{script}")
    alone = on_a_machine_of_its_own(f"set -- {called}\n{script}")

    assert (beside.returncode, alone.returncode) == (code, 0)
    assert beside.stderr.count("\n") == code and ("sudo bash deploy/install.sh uninstall" in beside.stderr) == bool(code)


@pytest.mark.parametrize("arguments", [["--jetpack", "5"], ["--purgee"], ["--torch"]])
def test_what_it_does_not_know_is_refused(arguments):
    done = subprocess.run(["bash", ROOT / "deploy" / "install.sh", "--dry-run", *arguments], capture_output=True, text=True)

    assert done.returncode == (1 if arguments == ["--torch"] else 2)  # bash's own ${2:?}
    assert "accepted are" in done.stderr or "needs" in done.stderr
