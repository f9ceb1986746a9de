"""The Debian package on a real systemd: a Debian root, booted by systemd-nspawn. One after the other, in this order; about three minutes.

The root that debootstrap made is kept in the directory that EDGEKWS_BOOT_ROOT names, and taken from there the next time (95 s then).
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("systemd-nspawn", "debootstrap", "dpkg-deb", "nsenter", "unshare")
PACKAGES = "systemd,systemd-sysv,dbus,python3,libportaudio2"
STREAM = "/usr/lib/edgekws/edgekws/demo"
STATE = "/var/lib/edgekws"

# What a process of a unit may: prints one line of JSON.
PROBE = """\
import errno, json, os, socket
try:
    socket.socket()
    inet = "may"
except OSError as error:
    inet = errno.errorcode[error.errno]
idle, oom = os.sched_getscheduler(0) == os.SCHED_IDLE, int(open("/proc/self/oom_score_adj").read())
print(json.dumps({"inet": inet, "idle": idle, "nice": os.nice(0), "oom": oom, "umask": oct(os.umask(0))}))
"""
# A stranger's client, with the library that the package brings.
DESCRIBE = """\
import asyncio, sys
sys.path.insert(0, "/usr/lib/edgekws")
from wyoming.client import AsyncTcpClient
from wyoming.info import Describe, Info
async def talk():
    async with AsyncTcpClient("127.0.0.1", 10400) as one:
        await one.write_event(Describe().event())
        print(*[model.name for model in Info.from_event(await one.read_event()).wake[0].models])
asyncio.run(talk())
"""

missing = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can boot a container"),
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (apt-get install systemd-container debootstrap)"),
]


class Machine:
    """A booted root file system."""

    def __init__(self, root):
        self.root = root

    def boot(self):
        # The root's own systemd is process 1 in it. Where the host has none, systemd-nspawn wants another file system under /run/systemd.
        alone = "" if Path("/run/systemd/system").exists() else "mkdir -p /run/systemd && mount -t tmpfs tmpfs /run/systemd && "
        # With the packages of this Python, for those that the Debian package does not bring (torch).
        command = (
            f'{alone}exec systemd-nspawn -D "$1" --boot --machine=edgekws-test --register=no --keep-unit --console=read-only'
            f" --bind-ro={sysconfig.get_path('platlib')}:/opt/site-packages"
        )
        with open(f"{self.root}.log", "ab") as log:
            self._nspawn = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", command, "sh", self.root], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until = time.monotonic() + 60
        while time.monotonic() < until and self._nspawn.poll() is None:
            children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
            if children:
                self._leader = int(children[0])
                if self.do("systemctl is-system-running", check=False) in ("running", "degraded"):
                    return
            time.sleep(0.2)
        said = Path(f"{self.root}.log").read_text(errors="replace")
        self.off()
        pytest.skip(f"systemd does not boot in a container here: {said[-500:]}")

    def off(self):
        if self._nspawn.poll() is None:
            os.kill(self._leader, signal.SIGRTMIN + 4)  # a clean power-off
            self._nspawn.wait(60)

    def do(self, command, check=True):
        """What a shell in it prints."""
        namespaces = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-p", "-n", "-C"]
        # A clean environment: the tests' own has nothing to say in there.
        done = subprocess.run(
            [*namespaces, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", command],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def show(self, name, unit="edgekws.service"):
        return self.do(f"systemctl show --value -p {name} {unit}")

    def drop_in(self, unit, text):
        """Adds to a unit; "" takes that away."""
        folder = self.root / "etc" / "systemd" / "system" / f"{unit}.d"
        shutil.rmtree(folder, ignore_errors=True)
        if text:
            folder.mkdir(parents=True)
            (folder / "test.conf").write_text(text)
        self.do("systemctl daemon-reload")

    def pid(self):
        return int(self.show("MainPID"))

    def wait_for(self, what, within_s, true=lambda said: bool(said)):
        """Seconds until the command prints what is wanted."""
        start_s = time.monotonic()
        while time.monotonic() - start_s < within_s:
            if true(said := self.do(what, check=False)):
                return time.monotonic() - start_s
            time.sleep(0.25)
        raise AssertionError(f"{what}: {said!r} after {within_s} s. {self.do('journalctl -u edgekws -n 30 --no-pager', check=False)}")

    def wait_for_another(self, pid, within_s):
        """Seconds until another process than `pid` is listening."""
        other = f"systemctl show --value -p MainPID -p ActiveState edgekws.service | grep -v -x {pid} | tr '\\n' ' '"
        return self.wait_for(
            other, within_s, lambda said: said.endswith("active") and "activating" not in said and said.split()[0].isdigit()
        )

    def events(self):
        return [json.loads(line) for line in self.do("edgekws log --all --json").splitlines()]

    def wakes(self):
        return sum(event["kind"] == "wake" for event in self.events())

    def files(self):
        """All of it, but for what a running system and apt write."""
        own = ("/tmp", "/var/tmp", "/var/log", "/var/cache", "/var/lib/dpkg", "/var/lib/apt", "/srv")
        return set(self.do(f"find / -xdev {' '.join(f'-not -path {folder!r}' for folder in (f'{one}/*' for one in own))}").split("\n"))


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """A root file system that nobody changes."""
    root = Path(os.environ.get("EDGEKWS_BOOT_ROOT") or tmp_path_factory.mktemp("debian") / "root")
    if not (root / "bin").exists():
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"debootstrap failed, perhaps for want of a network: {made.stdout[-300:]} {made.stderr[-300:]}")
    return root


@pytest.fixture(scope="module")
def package(debian):
    """The path of the Debian package for that root."""
    python = os.readlink(debian / "usr" / "bin" / "python3").removeprefix("python")
    done = subprocess.run(["bash", "deploy/build-deb.sh", "--python", python], cwd=ROOT, capture_output=True, text=True)
    if "No matching distribution" in done.stderr or "Connection" in done.stderr:
        pytest.skip(f"the package registry cannot be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return ROOT / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def machine(debian, tmp_path_factory):
    root = tmp_path_factory.mktemp("machine") / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", debian, root], check=True)
    machine = Machine(root)
    machine.boot()
    yield machine
    machine.off()
    shutil.rmtree(root, ignore_errors=True)


def install(machine, package):
    shutil.copy(package, machine.root / "srv" / "edgekws.deb")
    return machine.do("dpkg -i /srv/edgekws.deb 2>&1")


def test_it_installs_and_listens_from_the_next_boot_on(machine, package):
    soundfile = pytest.importorskip("soundfile")
    (machine.root / "srv" / "probe.py").write_text(PROBE)
    (machine.root / "srv" / "describe.py").write_text(DESCRIBE)
    machine.before = machine.files()
    install(machine, package)
    # Ten minutes of the bundled stream, at the pace of a microphone.
    samples, rate_hz = soundfile.read(ROOT / "edgekws" / "demo" / "stream.flac", dtype="int16")
    soundfile.write(machine.root / "srv" / "long.wav", list(samples) * 20, rate_hz, subtype="PCM_16")
    machine.do(f"install -m 600 -D -t /root/takes {STREAM}/enrol-*.flac")
    machine.do("edgekws enroll 'open sesame' /root/takes/*; rm -r /root/takes")  # by root, for an account that may not read them
    assert machine.do(f"find {STATE} -not -user edgekws") == ""
    machine.do("sed -i 's|^source = .*|source = \"file:/srv/long.wav?paced=1\"|' /etc/edgekws/edgekws.toml")
    machine.off()

    machine.boot()

    machine.wait_for("systemctl is-active edgekws.service", 30, lambda said: said == "active")  # Type=notify: it said READY
    assert "listening to file:/srv/long.wav" in machine.show("StatusText")
    assert machine.show("User") == "edgekws"
    assert machine.do(f"stat -c '%a %U' {STATE}") == "700 edgekws"
    assert machine.do("id -nG edgekws").split() == ["edgekws", "audio", "video", "render"]
    assert "libcrypto" not in machine.do(f"cat /proc/{machine.show('MainPID')}/maps")  # 4 MB that only the command itself keeps out


def test_wakes_are_in_the_journal_and_in_the_database(machine):
    machine.wait_for("journalctl -u edgekws -o cat", 60, lambda said: said.count("open sesame  score") >= 2)

    assert machine.wakes() >= 2


def test_the_doctor_and_the_status_line_tell_how_it_is(machine):
    machine.wait_for("systemctl show --value -p StatusText edgekws", 30, lambda said: 'the last "open sesame" at' in said)
    checks = {one["name"]: one for one in json.loads(machine.do("edgekws doctor --json"))}

    assert checks["service"]["ok"] and "active: listening to file:/srv/long.wav" in checks["service"]["detail"]
    assert [name for name, one in checks.items() if one["essential"] and not one["ok"]] == []


def test_the_unit_is_understood_and_shut_tight(machine):
    units = ("edgekws.service", "edgekws-adapt.service", "edgekws-wyoming.service")
    said = machine.do(f"systemd-analyze verify {' '.join(units)} edgekws-adapt.timer 2>&1 | grep edgekws || true")
    # "→ Overall exposure level for edgekws.service: 1.1 OK"
    levels = [
        machine.do(f"systemd-analyze security --no-pager {unit} | grep -i 'overall exposure'").split(":")[1].split()[0] for unit in units
    ]

    assert said == ""
    assert max(map(float, levels)) <= 2.0, levels


def test_who_runs_out_of_memory_while_it_builds_a_plan_ends_neither_service(machine):
    assert [machine.show("OOMPolicy", unit) for unit in ("edgekws.service", "edgekws-wyoming.service")] == ["continue", "continue"]


def test_the_listener_can_make_no_socket_to_anywhere(machine):
    """Whatever runs in its unit: what is heard cannot leave by it."""
    machine.drop_in("edgekws.service", "[Service]\nExecStartPre=/usr/bin/python3 /srv/probe.py\n")
    machine.do("systemctl restart edgekws")
    machine.drop_in("edgekws.service", "")
    probed = json.loads(machine.do("journalctl -u edgekws -o cat | grep '^{\"inet\"'"))

    assert (probed["inet"], probed["umask"], probed["nice"]) == ("EAFNOSUPPORT", "0o77", -5)
    assert set(machine.show("IPAddressDeny").split()) == {"::/0", "0.0.0.0/0"}


def test_mqtt_and_metrics_work_from_the_package_once_the_network_is_allowed(machine):
    with socket.socket() as probe:  # the container has the host's network
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = machine.root / "etc" / "edgekws" / "edgekws.toml"
    before = file.read_text()
    text = re.sub(r"(?s)(\[metrics\].*?\nport = )0", rf"\g<1>{port}", before)
    file.write_text(text.replace('url = ""', 'url = "mqtt://127.0.0.1:1"'))
    machine.drop_in("edgekws.service", (ROOT / "systemd" / "network.conf").read_text())
    machine.do("systemctl restart edgekws")
    page = f"python3 -c 'import urllib.request as r; print(r.urlopen(\"http://127.0.0.1:{port}/metrics\", timeout=20).read().decode())'"

    machine.wait_for(page, 60, lambda said: 'edgekws_wakes_total{keyword="open sesame"}' in said)
    assert 'edgekws_dropped_events_total{by="mqtt"} 0.0' in machine.do(page)
    machine.wait_for(
        "journalctl -u edgekws -o cat",
        30,
        lambda said: "mqtt: 127.0.0.1 cannot be reached ([Errno 111] Connection refused); wakes wait for it" in said,
    )
    file.write_text(before)
    machine.drop_in("edgekws.service", "")
    machine.do("systemctl restart edgekws")


def test_the_wake_service_is_off_and_once_on_it_answers(machine):
    assert machine.do("systemctl is-enabled edgekws-wyoming", check=False) == "disabled"

    machine.do("systemctl enable --now edgekws-wyoming")

    assert machine.do("python3 /srv/describe.py") == "open sesame"
    assert "serving on tcp://127.0.0.1:10400" in machine.show("StatusText", "edgekws-wyoming")
    pid = machine.show("MainPID", "edgekws-wyoming")
    machine.do(f"edgekws enroll 'second word' {STREAM}/enrol-*.flac")
    machine.wait_for("python3 /srv/describe.py", 30, lambda said: said == "open sesame second word")
    machine.do("edgekws enroll --remove 'second word'")
    assert machine.show("MainPID", "edgekws-wyoming") == pid
    machine.do("systemctl disable --now edgekws-wyoming")


def test_a_round_that_its_timer_starts_runs_behind_everything_else_and_its_end_is_in_the_log(machine):
    """First without torch, then with that of this Python. It is of the idle class: minutes on a busy machine."""
    machine.drop_in(
        "edgekws-adapt.timer", "[Timer]\nOnCalendar=\nOnActiveSec=1s\nRandomizedDelaySec=0\nAccuracySec=100ms\nPersistent=false\n"
    )
    machine.drop_in("edgekws-adapt.service", "[Service]\nExecStartPre=/usr/bin/python3 /srv/probe.py\n")
    assert machine.do("systemctl is-enabled edgekws-adapt.timer") == "enabled"
    assert machine.show("ActiveState", "edgekws-adapt.timer") == "active"
    pid = machine.pid()
    # Its own, of this Python, is of use to that of the same version only.
    torch = sysconfig.get_python_version() == "3.11" and machine.do("ls -d /opt/site-packages/torch", check=False)

    def fire(times):
        machine.do("systemctl restart edgekws-adapt.timer")
        try:
            machine.wait_for("journalctl -u edgekws-adapt -o cat", 120, lambda said: said.count("no round: ") == times)
        except AssertionError:
            if os.getloadavg()[0] > os.cpu_count():
                pytest.skip("on a machine as busy as this one a process of the idle class gets no time")
            raise
        machine.wait_for("systemctl is-active edgekws-adapt", 60, lambda said: said != "activating")
        machine.do("systemctl stop edgekws-adapt.timer")
        return machine.do("journalctl -u edgekws-adapt -o cat").splitlines()

    try:
        lines = fire(1)
        probed = json.loads(next(line for line in lines if line.startswith('{"inet"')))
        assert probed == {"inet": "EAFNOSUPPORT", "idle": True, "nice": 19, "oom": 500, "umask": "0o77"}
        (said,) = [line for line in lines if line.startswith(("edgekws: ", "no round")) or "Traceback" in line]
        assert said.startswith("no round: ") and "torch" not in said  # without it prototypes alone would move
        assert said.removeprefix("no round: ") in machine.do("edgekws log")
        assert machine.do("systemctl is-failed edgekws-adapt", check=False) == "inactive"
        assert machine.show("MemoryMax", "edgekws-adapt") == str(3 * 2**30)
        if torch:
            machine.do("ln -s /opt/site-packages /usr/local/lib/edgekws")
            fire(2)
            assert "torch" not in machine.do("edgekws log --kind round | tail -1")
    finally:
        machine.do(
            "rm -f /usr/local/lib/edgekws; systemctl stop edgekws-adapt.timer edgekws-adapt.service; systemctl reset-failed edgekws-adapt",
            False,
        )
        machine.drop_in("edgekws-adapt.timer", "")
        machine.drop_in("edgekws-adapt.service", "")

    assert machine.pid() == pid  # the listener noticed nothing


def test_killed_it_comes_back(machine):
    pid, wakes = machine.pid(), machine.wakes()
    machine.do(f"kill -9 {pid}")

    machine.wait_for_another(pid, 15)

    machine.wait_for("edgekws log | wc -l", 60, lambda said: int(said) > wakes)  # and it hears


def test_hung_it_is_killed_by_the_watchdog_and_comes_back(machine):
    pid = machine.pid()
    machine.do(f"kill -STOP {pid}")

    machine.wait_for_another(pid, 70)

    assert "Watchdog timeout" in machine.do("journalctl -u edgekws -o cat")


def test_a_refused_configuration_is_told_and_not_tried_again(machine):
    machine.do("cp -p /etc/edgekws/edgekws.toml /srv/ && echo 'volume = 11' >> /etc/edgekws/edgekws.toml")
    machine.do("systemctl restart edgekws", check=False)
    machine.wait_for("systemctl is-failed edgekws", 15, lambda said: said == "failed")

    assert 'unknown key "' in machine.do("journalctl -u edgekws -o cat -n 10")
    assert machine.show("ExecMainStatus") == "2"

    machine.do("cp -p /srv/edgekws.toml /etc/edgekws/ && systemctl restart edgekws")
    machine.wait_for("systemctl is-active edgekws.service", 30, lambda said: said == "active")


def test_an_upgrade_keeps_state_and_configuration_and_listens_on(machine, package, tmp_path):
    subprocess.run(["dpkg-deb", "-R", package, tmp_path / "next"], check=True)
    control = tmp_path / "next" / "DEBIAN" / "control"
    control.write_text(control.read_text().replace("\nVersion: ", "\nVersion: 1:"))
    (tmp_path / "next" / "usr" / "lib" / "edgekws" / "edgekws" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    subprocess.run(["dpkg-deb", "-Znone", "--build", tmp_path / "next", tmp_path / "next.deb"], check=True, capture_output=True)
    before, pid = [event["time"] for event in machine.events()], machine.pid()  # what a wake's clip was is added to it later

    install(machine, tmp_path / "next.deb")

    machine.wait_for_another(pid, 30)
    assert machine.do("edgekws --version") == "edgekws 9.9.9"
    assert [event["time"] for event in machine.events()][: len(before)] == before
    assert "open sesame" in machine.do("edgekws enroll --list")
    assert "/srv/long.wav" in machine.do("grep ^source /etc/edgekws/edgekws.toml")


def test_removal_keeps_state_and_purge_leaves_nothing(machine):
    machine.do("apt-get remove -y edgekws")

    assert machine.do("systemctl is-active edgekws", check=False) == "inactive"
    assert machine.do(f"ls {STATE}/edgekws.db")

    machine.do("apt-get purge -y edgekws")

    assert {file for file in machine.files() - machine.before if "/__pycache__/" not in file} == set()
    assert machine.do("id edgekws", check=False) == ""
