"""Meters and energy.

No board was at hand: the sysfs trees of Orin Nano, Orin NX, AGX Orin and of an x86 with RAPL are written here from the kernel's
documentation and device trees and from public listings, not recorded by us. The tegrastats lines are public ones of such boards.
"""

import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekws.errors import PowerError
from edgekws.power import (
    Energy,
    NoMeter,
    Recording,
    conditions,
    disagreement,
    ina3221,
    integrate,
    load_meter,
    nvml,
    rapl,
    tegrastats,
    whole,
)
from edgekws.power.gauge import Gauge
from edgekws.power.per_hop import per_hop

# address, hwmon, shunt in µΩ, channels of label, mV, mA
ORIN_NANO = (("1-0040", 1, 5000, (("VDD_IN", 5016, 952), ("VDD_CPU_GPU_CV", 5000, 104), ("VDD_SOC", 5000, 288))),)
ORIN_NX = (("1-0040", 3, 5000, (("VDD_IN", 4968, 1240), ("VDD_CPU_GPU_CV", 4960, 240), ("VDD_SOC", 4960, 376))),)
AGX_ORIN = (
    ("1-0040", 3, 2000, (("VDD_GPU_SOC", 19088, 126), ("VDD_CPU_CV", 19088, 21), ("VIN_SYS_5V0", 4968, 811))),
    ("1-0041", 4, 2000, (("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 4968, 60), ("NC", 0, 0))),
)
BOARDS = {"orin-nano": ORIN_NANO, "orin-nx": ORIN_NX, "agx-orin": AGX_ORIN}


def jetson(sysfs: Path, chips) -> Path:
    """The INA3221 part of /sys, the device folder behind a link as there."""
    for address, hwmon, shunt_uohm, channels in chips:
        folder = sysfs / "devices" / "platform" / "c240000.i2c" / "i2c-1" / address / "hwmon" / f"hwmon{hwmon}"
        folder.mkdir(parents=True)
        for i, (label, mv, ma) in enumerate(channels, start=1):
            for name, value in ((f"in{i}_label", label), (f"in{i}_input", mv), (f"curr{i}_input", ma), (f"shunt{i}_resistor", shunt_uohm)):
                (folder / name).write_text(f"{value}\n")
        (folder / "in7_label").write_text("sum of shunt voltages\n")
        (folder / "in7_input").write_text("6720\n")
        link = sysfs / "bus" / "i2c" / "drivers" / "ina3221" / address
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder.parent.parent)
    return sysfs


def channel(sysfs: Path, name: str) -> Path:
    return next(sysfs.glob(f"bus/i2c/drivers/ina3221/*/hwmon/hwmon*/{name}"))


def x86(sysfs: Path, **energy_uj: int) -> Path:
    """The powercap part of /sys: a package with its core and memory, and package 0 once more as intel-rapl-mmio."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    for zone, name in zones.items():
        folder = sysfs / "class" / "powercap" / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
    set_counters(sysfs, package=0, core=0, dram=0)
    set_counters(sysfs, **energy_uj)
    return sysfs


def set_counters(sysfs: Path, **energy_uj: int) -> None:
    places = {
        "package": ("intel-rapl:0", "intel-rapl-mmio:0"),
        "core": ("intel-rapl:0:0",),
        "dram": ("intel-rapl:0:1",),
        "psys": ("intel-rapl:1",),
    }
    for name, value in {"psys": 0, **energy_uj}.items():
        for zone in places[name]:
            (sysfs / "class" / "powercap" / zone / "energy_uj").write_text(f"{value}\n")


# The meters.


@pytest.mark.parametrize(
    ("board", "rail", "mw", "rails", "step_mw"),
    [
        ("orin-nano", "VDD_IN", 4775.2, {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}, 40.1),
        ("orin-nx", "VDD_IN", 6160.3, {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}, 39.7),
        (
            "agx-orin",
            "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0",
            6835.0,
            {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"},
            381.8,
        ),
    ],
)
def test_an_ina3221_is_read_by_its_labels(board, rail, mw, rails, step_mw, tmp_path):
    meter = ina3221.open_meter(jetson(tmp_path, BOARDS[board]))
    read = meter.read()

    assert meter.rail == rail
    assert read[rail] == pytest.approx(mw, abs=0.1)
    assert read.keys() == {rail} | rails  # neither NC nor the sum of shunt voltages
    assert meter.step_mw == pytest.approx(step_mw, abs=0.1)


def test_channels_may_stand_in_any_order(tmp_path):
    ((address, hwmon, shunt, channels),) = ORIN_NANO
    meter = ina3221.open_meter(jetson(tmp_path, ((address, hwmon, shunt, channels[::-1]),)))

    assert meter.read()["VDD_IN"] == pytest.approx(4775.2, abs=0.1)


def test_without_the_shunts_value_that_of_orin_nano_is_taken(tmp_path):
    for file in jetson(tmp_path, ORIN_NANO).glob("**/shunt*"):
        file.unlink()

    assert ina3221.open_meter(tmp_path).step_mw == pytest.approx(40.1, abs=0.1)


def test_rails_of_an_unknown_board_are_not_added_up_blindly():
    with pytest.raises(PowerError, match="no rail is known to be the whole module's: found VDD_A, VDD_B; known are VDD_IN or VDD_GPU_SOC"):
        whole({"VDD_A": 1.0, "VDD_B": 2.0})


def test_rapl_counts_packages_and_memory_once(tmp_path):
    meter = rapl.open_meter(x86(tmp_path, package=7_000_000, core=5_000_000, dram=1_000_000))
    set_counters(tmp_path, package=9_000_000, core=6_000_000, dram=1_500_000)

    assert (meter.rail, meter.counts) == ("package-0 + package-0/dram", True)
    assert meter.read() == {"package-0": 2000.0, "package-0/core": 1000.0, "package-0/dram": 500.0, "psys": 0.0, meter.rail: 2500.0}


def test_a_rapl_counter_that_starts_again_goes_on(tmp_path):
    meter = rapl.open_meter(x86(tmp_path, package=262_143_000_000))
    set_counters(tmp_path, package=671_150)

    assert meter.read()["package-0"] == pytest.approx(1000.0)  # 328.85 mJ to the range's end, 671.15 after it


def test_counters_for_root_alone_say_how_to_open_them(tmp_path, monkeypatch):
    """Faked, as root may read every file."""
    x86(tmp_path)
    read = Path.read_text

    def refuse(self, *arguments, **options):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)

    with pytest.raises(PowerError, match=r"energy_uj may be read by root only \(sudo chmod a\+r "):
        rapl.open_meter(tmp_path)


ORIN_NANO_JP6 = (
    "04-27-2026 14:59:41 RAM 775/7620MB (lfb 3x4MB) SWAP 0/3810MB (cached 0MB) CPU [1%@729,0%@729,0%@729,0%@729,off,off] GR3D_FREQ 0%"
    " cpu@48.468C soc2@47.531C soc0@48.062C gpu@48.562C tj@49.156C soc1@49.156C VDD_IN 4761mW/4778mW VDD_CPU_GPU_CV 515mW/501mW"
    " VDD_SOC 1428mW/1428mW"
)
ORIN_NANO_ROOT = (
    "09-12-2026 02:14:33 RAM 1484/3602MB (lfb 21x4MB) SWAP 436/14089MB (cached 7MB) CPU [3%@729,2%@729] EMC_FREQ 0%@2133"
    " GR3D_FREQ 0%@[305] NVDEC off NVJPG off NVJPG1 off VIC off OFA off APE 200 cpu@56.281C VDD_IN 4428mW/4428mW VDD_CPU_GPU_CV 562mW/562mW"
)
AGX_ORIN_JP5 = (
    "RAM 3190/30536MB (lfb 6185x4MB) SWAP 0/15268MB (cached 0MB) CPU [2%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@0 GR3D2_FREQ 0%@0"
    " VIC_FREQ 729 APE 174 CV0@-256C CPU@42.593C Tboard@32C SOC2@39.343C Tdiode@33.25C GPU@-256C tj@42.593C VDD_GPU_SOC 2399mW/2399mW"
    " VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 4032mW/4032mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
)


@pytest.mark.parametrize(
    ("line", "rails"),
    [
        (ORIN_NANO_JP6, {"VDD_IN": 4761, "VDD_CPU_GPU_CV": 515, "VDD_SOC": 1428}),
        (ORIN_NANO_ROOT, {"VDD_IN": 4428, "VDD_CPU_GPU_CV": 562}),
        (AGX_ORIN_JP5, {"VDD_GPU_SOC": 2399, "VDD_CPU_CV": 400, "VIN_SYS_5V0": 4032, "VDDQ_VDD2_1V8AO": 301}),
    ],
    ids=["orin-nano-jp6", "orin-nano-root", "agx-orin-jp5"],
)
def test_a_tegrastats_line_gives_what_is_drawn_now(line, rails):
    """Not the averages behind the slash, no channel that is not connected."""
    assert tegrastats.rails_mw(line) == rails


def speaking(script: str) -> tegrastats.Tegrastats:
    """A child in tegrastats' place."""
    return tegrastats.open_meter(Path("/nowhere"), ("sh", "-c", script))


def test_the_newest_whole_line_of_tegrastats_counts(tmp_path):
    """Those before it were said at a time that nobody saw."""
    go = tmp_path / "go"
    meter = speaking(f"echo '{ORIN_NANO_JP6}'; until [ -e {go} ]; do sleep 0.02; done; printf 'VDD_IN 1mW/1mW\\nVDD_IN 2mW/1mW\\nVDD_IN 9'")
    go.touch()

    assert meter.read() == {"VDD_IN": 2}
    meter.close()


def test_a_tegrastats_that_dies_says_so():
    meter = speaking(f"echo '{ORIN_NANO_JP6}'; exit 7")
    with pytest.raises(PowerError, match="tegrastats ended with exit code 7"):
        meter.read()
    meter.close()


def test_a_tegrastats_that_hangs_says_so(monkeypatch):
    monkeypatch.setattr(tegrastats, "WAIT_S", 0.3)
    meter = speaking(f"echo '{ORIN_NANO_JP6}'; sleep 30")
    with pytest.raises(PowerError, match=r"tegrastats has said nothing for 0\.3 s"):
        meter.read()
    meter.close()
    assert meter._child.returncode is not None


def test_closing_ends_the_child():
    meter = speaking(f"while :; do echo '{ORIN_NANO_JP6}'; sleep 0.05; done")
    assert meter.read()["VDD_IN"] == 4761
    meter.close()

    assert meter._child.returncode is not None


class Nvidia:
    """NVML in the shapes that it has here and there; faked, as there is no NVIDIA driver."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, energy_mj=None, power_mw=None, driver=True):
        self.energy_mj, self.power_mw, self.driver, self.open = energy_mj, power_mw, driver, False

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open = True

    def nvmlShutdown(self):
        self.open = False

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, device):
        if self.energy_mj is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return self.energy_mj

    def nvmlDeviceGetPowerUsage(self, device):
        if self.power_mw is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return self.power_mw


@pytest.fixture
def nvidia(monkeypatch):
    def install(**state) -> Nvidia:
        library = Nvidia(**state)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        monkeypatch.setattr(nvml.importlib.util, "find_spec", lambda name: SimpleNamespace() if name == "pynvml" else None)
        return library

    return install


def test_nvml_counts_where_the_card_counts(nvidia):
    library = nvidia(energy_mj=1_000_000)
    meter = nvml.open_meter(Path("/sys"))
    library.energy_mj += 250

    assert (meter.counts, meter.read()) == (True, {"GPU 0": 250.0})


def test_nvml_reads_power_where_it_does_not(nvidia):
    nvidia(power_mw=61_000)
    meter = nvml.open_meter(Path("/sys"))

    assert (meter.counts, meter.read()) == (False, {"GPU 0": 61_000.0})


def test_nvml_on_orin_starts_and_then_reads_nothing(nvidia):
    library = nvidia()
    with pytest.raises(PowerError, match="Not Supported: this GPU gives no reading"):
        nvml.open_meter(Path("/sys"))

    assert not library.open


def test_nvml_without_a_driver_says_so(nvidia):
    nvidia(driver=False)
    with pytest.raises(PowerError, match="NVML Shared Library Not Found"):
        nvml.open_meter(Path("/sys"))


@pytest.mark.parametrize("module", [ina3221, rapl])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_files_hold_there_is_a_reading_or_a_reason(module, data, tmp_path_factory):
    tree = x86(jetson(tmp_path_factory.mktemp("sys"), AGX_ORIN))
    files = sorted(file for file in tree.rglob("*") if file.is_file())
    for file in data.draw(st.lists(st.sampled_from(files), max_size=6)):
        content = data.draw(st.none() | st.binary(max_size=30) | st.integers(-(10**12), 10**12).map(lambda n: f"{n}\n".encode()))
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
    try:
        meter = module.open_meter(tree)
        assert all(math.isfinite(value) for value in meter.read().values())
    except PowerError as error:
        assert str(error).isprintable()


# The choice.


@pytest.fixture
def alone(monkeypatch):
    """No jtop, tegrastats or NVIDIA driver of this machine gets in."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(nvml.importlib.util, "find_spec", lambda name: None)


def test_the_jetsons_own_chip_comes_first(tmp_path, alone):
    assert load_meter(sysfs=x86(jetson(tmp_path, ORIN_NANO))).name == "ina3221"


def test_a_meter_is_chosen_only_after_it_gave_a_reading(tmp_path, alone):
    x86(jetson(tmp_path, ORIN_NANO))
    channel(tmp_path, "curr1_input").write_text("busy\n")

    assert load_meter(sysfs=tmp_path).name == "rapl"
    assert 'curr1_input holds "busy", which is no whole number' in load_meter("ina3221", sysfs=tmp_path).why


def test_a_meter_that_opens_and_then_refuses_is_passed_over(tmp_path, alone, monkeypatch):
    """Faked: the sensor was read when it was opened, and is gone right after."""

    def gone(self):
        raise PowerError("gone")

    monkeypatch.setattr(ina3221.Ina3221, "read", gone)

    assert load_meter(sysfs=x86(jetson(tmp_path, ORIN_NANO))).name == "rapl"


def test_no_meter_says_why_for_each(tmp_path, alone):
    meter = load_meter(sysfs=tmp_path)

    assert meter.name == "none"
    assert meter.why == (
        f"no power meter can be read here (ina3221: no {tmp_path}/bus/i2c/drivers/ina3221 (no Jetson, or no driver);"
        " jtop: the package is not installed (pip install 'edgekws[jetson]'; it is AGPL-3.0);"
        " tegrastats: tegrastats is not installed (it comes with JetPack); nvml: the package is not installed (pip install nvidia-ml-py);"
        f" rapl: no intel-rapl under {tmp_path}/class/powercap (virtual machines seldom have it))"
    )


def test_a_meter_of_the_processor_alone_will_not_do_for_a_gpu_engine(tmp_path, alone):
    assert load_meter(sysfs=x86(tmp_path)).name == "rapl"
    assert "rapl: measures only the cpu, and the gpu computes too" in load_meter(sysfs=tmp_path, gpu=True).why


def test_a_card_is_no_meter_for_the_processor(tmp_path, alone, nvidia):
    nvidia(energy_mj=1)

    assert load_meter(sysfs=x86(tmp_path)).name == "rapl"
    assert "nvml: measures only the gpu, and the cpu computes too" in load_meter("nvml").why


def test_an_unknown_meter_lists_those_accepted():
    with pytest.raises(PowerError, match=r'no power meter "watts"\. Accepted: auto, ina3221, jtop, tegrastats, nvml, rapl'):
        load_meter("watts")


def test_two_meters_that_agree_are_not_reported(tmp_path):
    one = ina3221.open_meter(jetson(tmp_path / "a", ORIN_NANO))
    other = ina3221.open_meter(jetson(tmp_path / "b", ORIN_NANO))
    channel(tmp_path / "b", "curr1_input").write_text("1000\n")  # 5 % more

    assert disagreement(one, other) is None


def test_two_meters_that_do_not_are_reported_with_both_numbers(tmp_path):
    one = ina3221.open_meter(jetson(tmp_path / "a", ORIN_NANO))
    other = ina3221.open_meter(jetson(tmp_path / "b", ORIN_NANO))
    channel(tmp_path / "b", "curr1_input").write_text("1200\n")

    assert disagreement(one, other) == (
        "ina3221 reads 6735 mW and ina3221 7979 mW over the same rails (VDD_CPU_GPU_CV, VDD_IN, VDD_SOC): more than 10% apart,"
        " so trust neither before you know why"
    )


# Energy.


class Synthetic:
    """A load whose joules are known: 5 W, a wave of 1 W each 1.3 s, and bursts of 3 W for 0.1 s of each 0.7 s."""

    name, rail, covers, counts, interval_s, waits, step_mw = "synthetic", "IN", frozenset({"cpu", "gpu"}), False, 0.05, False, None

    def mw(self, t: float) -> float:
        return 5000 + 1000 * math.sin(2 * math.pi * t / 1.3) + (3000 if t % 0.7 < 0.1 else 0)

    def joules(self, begin: float, end: float) -> float:
        def until(t: float) -> float:
            wave = 1.3 / (2 * math.pi) * (1 - math.cos(2 * math.pi * t / 1.3))
            return 5 * t + wave + 3 * (0.1 * (t // 0.7) + min(t % 0.7, 0.1))

        return until(end) - until(begin)


@pytest.mark.parametrize("seed", range(5))
def test_energy_at_20_hz_is_within_1_percent(seed):
    """Readings come up to 20 ms late, as on a busy machine."""
    load, chance = Synthetic(), random.Random(seed)
    times = [0.05 * i + chance.uniform(0, 0.02) for i in range(1, 700)]
    truth = load.joules(1.234, 31.234)

    assert integrate(times, [load.mw(t) for t in times], 1.234, 31.234) == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_energy_is_within_1_percent_though_a_tenth_of_the_readings_is_missing(seed):
    load, chance = Synthetic(), random.Random(seed)
    times = [0.05 * i for i in range(700) if chance.random() > 0.1]
    truth = load.joules(1.234, 31.234)

    assert integrate(times, [load.mw(t) for t in times], 1.234, 31.234) == pytest.approx(truth, rel=0.01)


def test_constant_power_is_exact_for_any_window():
    assert integrate([0.0, 0.4, 1.0, 1.6], [2000.0] * 4, 0.3, 1.3) == pytest.approx(2.0)
    assert integrate([0.0, 0.4, 1.0, 1.6], [2000.0] * 4, 0.5, 0.6) == pytest.approx(0.2)


def test_a_ramp_is_exact():
    times = [0.0, 0.31, 0.7, 1.5, 2.0]
    assert integrate(times, [1000 * t for t in times], 0.5, 1.5) == pytest.approx(1.0)


def test_a_counter_is_read_at_the_windows_edges():
    assert integrate([0.0, 1.0, 2.0], [0.0, 500.0, 1500.0], 0.5, 1.5, counts=True) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([], "no reading from 0.0 s to 4.0 s of 4.0 s"),
        ([10.0, 10.5, 11.0], "no reading from 1.0 s to 4.0 s of 4.0 s"),
        ([10.0, 10.9, 12.9, 13.5, 14.2], "no reading from 0.9 s to 2.9 s of 4.0 s"),
        ([12.0, 13.0, 14.0], "no reading from 0.0 s to 2.0 s of 4.0 s"),
    ],
)
def test_too_long_without_a_reading_is_no_energy(times, said):
    with pytest.raises(PowerError) as refusal:
        integrate(times, [5000.0] * len(times), 10.0, 14.0)
    assert str(refusal.value) == said


class Ramp(Synthetic):
    """Power that grows with the clock: the trapezoid of it is exact whenever the readings come."""

    counts = False

    def read(self):
        t = time.monotonic()
        return {"IN": 1000 * (t - self.begin_s), "PART": 500 * (t - self.begin_s)}

    def __init__(self):
        self.begin_s = time.monotonic()

    def close(self):
        pass


@pytest.fixture
def patient(monkeypatch):
    """A busy machine may starve the sampler for longer than a second, which is not what these tests are about."""
    monkeypatch.setattr("edgekws.power.recording.GAP_S", 60.0)


def test_a_recording_integrates_each_rail_between_any_two_moments(patient):
    meter = Ramp()
    with Recording(meter) as recording:
        begin_s = time.monotonic()
        time.sleep(0.4)
        end_s = time.monotonic()
        time.sleep(0.1)
    energy = recording.energy(begin_s, end_s)
    truth = ((end_s - meter.begin_s) ** 2 - (begin_s - meter.begin_s) ** 2) / 2

    assert energy.joules == pytest.approx(truth, rel=0.01)
    assert energy.rails_j == pytest.approx({"IN": truth, "PART": truth / 2}, rel=0.01)
    assert energy.mean_mw == pytest.approx(truth / (end_s - begin_s) * 1000, rel=0.01)
    assert energy.samples >= 2


def test_no_meter_gives_the_reason_and_never_zero():
    with Recording(NoMeter("no power meter can be read here (rapl: none)")) as recording:
        pass

    assert (recording.energy().joules, recording.energy().mean_mw) == (None, None)
    assert recording.energy().why_not == "no power meter can be read here (rapl: none)"


def wait_for(true, at_most_s=10.0):
    """Polls, as the recording has a thread of its own."""
    end = time.monotonic() + at_most_s
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_a_chip_that_vanishes_in_the_middle_is_no_energy(tmp_path, monkeypatch):
    monkeypatch.setattr("edgekws.power.recording.GAP_S", 0.3)
    meter = ina3221.open_meter(jetson(tmp_path, ORIN_NANO))
    with Recording(meter) as recording:
        time.sleep(0.1)
        shutil.rmtree(tmp_path / "devices")
        time.sleep(0.5)
    energy = recording.energy()

    assert energy.joules is None
    assert energy.rails_j == {}
    assert energy.why_not.startswith("ina3221: no reading from 0.")
    assert "curr1_input: No such file or directory" in energy.why_not or "in1_input: No such file or directory" in energy.why_not


def test_a_chip_that_is_busy_for_a_moment_is_bridged(tmp_path, patient):
    meter = ina3221.open_meter(jetson(tmp_path, ORIN_NANO))
    file = channel(tmp_path, "curr2_input")
    with Recording(meter) as recording:
        time.sleep(0.12)
        file.rename(file.with_suffix(".away"))
        wait_for(lambda: recording._trouble)
        file.with_suffix(".away").rename(file)
        time.sleep(0.12)
    energy = recording.energy()

    assert energy.mean_mw == pytest.approx(4775.2, rel=0.001)
    assert energy.missing >= 1


def test_a_dead_tegrastats_child_is_no_energy(monkeypatch):
    monkeypatch.setattr("edgekws.power.recording.GAP_S", 0.2)
    monkeypatch.setattr(tegrastats.Tegrastats, "interval_s", 0.05)
    meter = speaking(f"for i in 1 2 3 4; do echo '{ORIN_NANO_JP6}'; sleep 0.05; done; exit 3")
    with Recording(meter) as recording:
        time.sleep(0.8)
    meter.close()
    energy = recording.energy()

    assert energy.joules is None
    assert energy.why_not.endswith("(tegrastats ended with exit code 3)")


def test_a_living_tegrastats_child_gives_energy(patient):
    meter = speaking(f"while :; do echo '{ORIN_NANO_JP6}'; sleep 0.05; done")
    with Recording(meter) as recording:
        time.sleep(0.5)
    meter.close()

    assert recording.energy().mean_mw == pytest.approx(4761, rel=0.001)


def test_a_rapl_counter_that_starts_again_in_a_recording_loses_nothing(tmp_path):
    counter_uj = 262_143_000_000
    meter = rapl.open_meter(x86(tmp_path, package=counter_uj))
    with Recording(meter) as recording:
        recording._stop.set()  # the test takes the readings
        for _ in range(20):
            counter_uj += 100_000
            set_counters(tmp_path, package=counter_uj % 262_143_328_850)
            recording.sample()

    assert recording.energy(recording._times[0], recording._times[-1]).joules == pytest.approx(2.0)


def test_a_meter_that_hangs_does_not_hang_the_measurement():
    released = threading.Event()

    class Hung(Ramp):
        def read(self):
            if threading.current_thread() is not threading.main_thread():
                released.wait()
            return super().read()

    recording = Recording(Hung())
    recording._thread.join = lambda timeout: None  # without waiting 5 s for it
    with recording:
        pass
    released.set()

    assert len(recording._times) == 1


# What a hop costs.


def windows(*mean_mw: float, seconds: float = 10.0) -> list[Energy]:
    return [Energy(mw * seconds / 1000, seconds, {"VDD_IN": mw * seconds / 1000}) for mw in mean_mw]


def test_a_hop_costs_what_is_drawn_above_the_idle_around_it():
    """100 mW more than idle for 10 s are 1 J, in 125 hops; idle drifts up by 20 mW in each window and falls out."""
    cost = per_hop(windows(4000, 4020, 4020, 4040), windows(4110, 4130), [125, 125], step_mw=40.0)

    assert cost["above_idle_mw"] == {"median": 100.0, "min": 100.0, "max": 100.0}
    assert cost["mj_per_hop_above_idle"] == pytest.approx(8.0)
    assert cost["mj_per_hop"] == pytest.approx(4120 * 0.08, rel=1e-3)
    assert cost["rails_mj_per_hop"] == {"VDD_IN": cost["mj_per_hop"]}
    assert (cost["hops"], cost["why_not"]) == (250, "")


def test_less_than_the_sensor_can_tell_is_no_number():
    cost = per_hop(windows(4000, 4000), windows(4012), [125], step_mw=40.0)

    assert cost["mj_per_hop_above_idle"] is None
    assert cost["why_not"] == "below the sensor's resolution (12.0 mW above idle, 40.0 can be told)"
    assert cost["mj_per_hop_resolution"] == pytest.approx(3.2)
    assert cost["mj_per_hop"] == pytest.approx(4012 * 0.08, rel=1e-3)


def test_what_scatters_more_than_it_costs_is_no_number():
    """A counter has no step; but 3, -1 and 7 mW are 3 ± 4.6 (two standard errors)."""
    cost = per_hop(windows(*[1000] * 6), windows(1003, 999, 1007), [125] * 3, step_mw=None)

    assert cost["mj_per_hop_above_idle"] is None
    assert cost["resolution_mw"] == pytest.approx(4.62, abs=0.01)


def test_a_counter_that_stands_still_is_no_energy_and_not_zero():
    cost = per_hop(windows(0, 0), windows(0), [125], step_mw=None)

    assert (cost["mj_per_hop"], cost["mj_per_hop_above_idle"]) == (None, None) and "stood still" in cost["why_not"]


def test_less_than_idle_is_no_negative_energy():
    assert per_hop(windows(4000, 4000), windows(3900), [125], step_mw=40.0)["mj_per_hop_above_idle"] is None


def test_one_unknown_window_makes_all_of_it_unknown():
    cost = per_hop([*windows(4000), Energy(None, 10.0, why_not="the chip vanished")], windows(4100), [125], step_mw=40.0)

    assert cost == {"mj_per_hop": None, "mj_per_hop_above_idle": None, "why_not": "the chip vanished"}


# What else is recorded.


def test_temperatures_and_clocks_are_read_where_there_are_any(tmp_path):
    for i, (zone, milli) in enumerate((("cpu-thermal", "48468"), ("tj-thermal", "49156"), ("cv0-thermal", "-256000"))):
        folder = tmp_path / "class" / "thermal" / f"thermal_zone{i}"
        folder.mkdir(parents=True)
        (folder / "type").write_text(f"{zone}\n")
        (folder / "temp").write_text(f"{milli}\n")
    core = tmp_path / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    gpu = tmp_path / "class" / "devfreq" / "17000000.gpu"
    core.mkdir(parents=True)
    gpu.mkdir(parents=True)
    (core / "scaling_cur_freq").write_text("729600\n")
    (gpu / "cur_freq").write_text("305000000\n")

    assert conditions.temperatures_c(tmp_path) == {"cpu": 48.5, "tj": 49.2}
    assert conditions.hottest_c(tmp_path) == 49.2
    assert conditions.clocks_mhz(tmp_path) == {"cpu0": 729.6, "gpu": 305.0}
    assert conditions.hottest_c(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("files", "drained"),
    [
        ({"type": "Battery", "status": "Discharging"}, True),
        ({"type": "Battery", "status": "Discharging", "scope": "System"}, True),
        ({"type": "Battery", "status": "Charging"}, False),
        ({"type": "Battery", "status": "Discharging", "scope": "Device"}, False),  # a mouse's
        ({"type": "Mains", "online": "1"}, False),
    ],
)
def test_only_a_battery_that_drives_the_machine_and_is_drained_counts(files, drained, tmp_path):
    for supply, told in (("BAT0", files), ("BAT1", {"type": "Battery"})):
        folder = tmp_path / "class" / "power_supply" / supply
        folder.mkdir(parents=True)
        for name, text in told.items():
            (folder / name).write_text(f"{text}\n")

    assert conditions.on_battery(tmp_path) is drained
    assert conditions.on_battery(tmp_path / "nothing") is False


def test_the_power_mode_is_read_by_its_name(tmp_path, monkeypatch):
    program = tmp_path / "nvpmodel"
    program.write_text("#!/bin/sh\n[ \"$1\" = -q ] && printf 'NV Power Mode: MAXN_SUPER\\n2\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert conditions.power_mode() == "MAXN_SUPER"

    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert conditions.power_mode() is None


def test_what_nothing_tells_is_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")

    assert conditions.conditions(tmp_path) == {"temperature_c": {}, "clock_mhz": {}, "power_mode": None}


def test_jtop_fills_in_what_the_kernel_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    jtop = SimpleNamespace(conditions=lambda: {"temperature_c": {"tj": 50.0}, "clock_mhz": {}, "power_mode": "15W"})

    assert conditions.conditions(tmp_path, jtop) == {"temperature_c": {"tj": 50.0}, "clock_mhz": {}, "power_mode": "15W"}


def test_free_memory_is_what_can_be_had_without_swapping(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 7802880 kB\nMemFree: 100000 kB\nMemAvailable:  2000000 kB\n")

    assert conditions.free_memory_mb(tmp_path / "meminfo") == pytest.approx(2048)
    assert conditions.free_memory_mb(tmp_path / "nothing") is None


# jtop, for real: NVIDIA-free jetson-stats, its service and a client of it, over a fake tree. AGPL-3.0, so only where somebody installed it.

JTOP_PYTHON = os.environ.get("EDGEKWS_JTOP_PYTHON") or (sys.executable if find_spec("jtop") else "")
FAKE_SYS = Path("/fake_sys")  # where jetson-stats looks when it is tested
CLIENT = """
import json, sys
from pathlib import Path
import edgekws.power.recording
edgekws.power.recording.GAP_S = 5.0  # a busy machine may starve the client for a second or two
from edgekws.power import Recording, conditions, disagreement, ina3221, load_meter
meter = load_meter("jtop")
print(json.dumps([meter.name, meter.read(), meter.conditions()]))
print(disagreement(ina3221.open_meter(Path(sys.argv[1])), meter), flush=True)
with Recording(meter) as recording:
    sys.stdin.readline()
    print(recording.energy().mean_mw, flush=True)
    sys.stdin.readline()
print(json.dumps([recording.energy().joules, recording.energy().why_not]))
"""


@pytest.fixture
def jtop_service():
    if not JTOP_PYTHON:
        pytest.skip("jetson-stats is not installed (a virtual environment with it, its interpreter in EDGEKWS_JTOP_PYTHON)")
    if os.geteuid() != 0 or FAKE_SYS.exists() or Path("/run/jtop.sock").exists():
        pytest.skip(f"jtop's service wants root, and {FAKE_SYS} and /run/jtop.sock for itself")
    try:
        jetson(FAKE_SYS, ORIN_NANO)
        devices = FAKE_SYS / "bus" / "i2c" / "devices"
        devices.mkdir()
        chip = FAKE_SYS / "devices" / "platform" / "c240000.i2c" / "i2c-1" / "1-0040"
        (chip / "name").write_text("ina3221\n")
        (devices / "1-0040").symlink_to(chip)
        core = FAKE_SYS / "devices" / "system" / "cpu" / "cpu0"
        (core / "cpufreq").mkdir(parents=True)
        (core / "online").write_text("1\n")
        (core / "cpufreq" / "scaling_governor").write_text("schedutil\n")
        for kind in ("scaling", "cpuinfo"):
            for what, khz in (("min", 115200), ("max", 1728000), ("cur", 729600)):
                (core / "cpufreq" / f"{kind}_{what}_freq").write_text(f"{khz}\n")
        (FAKE_SYS / "stat").write_text("cpu  100 0 50 1000 0 0 0 0 0 0\ncpu0 100 0 50 1000 0 0 0 0 0 0\n")
        for folder in ("class/devfreq", "class/hwmon", "class/power_supply", "kernel"):
            (FAKE_SYS / folder).mkdir(parents=True)
        script = Path(__file__).with_name("jtop_service.py")
        service = subprocess.Popen(
            [JTOP_PYTHON, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert service.stdout.readline() == "ready\n"
        yield service
        service.communicate(timeout=30)
    finally:
        shutil.rmtree(FAKE_SYS)


def test_a_real_jtop_service_is_read_and_checked_against_sysfs(jtop_service):
    import json

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    client = subprocess.Popen(
        [JTOP_PYTHON, "-c", CLIENT, FAKE_SYS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    name, read, told = json.loads(client.stdout.readline())
    assert (name, read) == ("jtop", {"VDD_IN": 4775, "VDD_CPU_GPU_CV": 520, "VDD_SOC": 1440})
    assert told["clock_mhz"] == {"cpu0": 729.6}
    assert client.stdout.readline() == "None\n"  # they agree
    time.sleep(2)
    print(file=client.stdin, flush=True)
    assert float(client.stdout.readline()) == pytest.approx(4775)

    jtop_service.communicate(timeout=30)  # the service ends in the middle
    time.sleep(7)
    print(file=client.stdin, flush=True)
    joules, why_not = json.loads(client.stdout.readline())
    assert joules is None
    assert "jtop" in why_not
    client.communicate(timeout=30)


def test_a_gauge_shows_what_the_chip_reads_once_a_second(tmp_path):
    jetson(tmp_path, ORIN_NANO)
    clock = {"now_s": 100.0}
    gauge = Gauge(tmp_path, lambda: clock["now_s"])
    assert (gauge.name, round(gauge.mw())) == ("ina3221 VDD_IN", 4775)

    channel(tmp_path, "curr1_input").write_text("1000\n")
    assert round(gauge.mw()) == 4775
    clock["now_s"] += 1.0
    assert round(gauge.mw()) == 5016


def test_a_gauge_makes_the_mean_of_a_counter_s_steps(tmp_path):
    x86(tmp_path)
    clock = {"now_s": 100.0}
    gauge = Gauge(tmp_path, lambda: clock["now_s"])
    assert (gauge.name, gauge.mw()) == ("rapl package-0 + package-0/dram", None)

    clock["now_s"] += 2.0
    set_counters(tmp_path, package=12_000_000, dram=2_000_000)
    assert gauge.mw() == 7000.0
    counters = sorted(tmp_path.rglob("energy_uj"))
    kept = [path.read_text() for path in counters]
    for path in counters:
        path.unlink()
    clock["now_s"] += 2.0
    assert gauge.mw() is None  # it could not be read
    for path, text in zip(counters, kept, strict=True):
        path.write_text(text)
    set_counters(tmp_path, package=36_000_000, dram=6_000_000)
    clock["now_s"] += 2.0
    assert gauge.mw() == 7000.0  # over four seconds, and not over two
    clock["now_s"] += 3600.0
    assert gauge.mw() is None  # the counter may have begun again since


def test_a_gauge_without_a_meter_says_why(tmp_path):
    gauge = Gauge(tmp_path)

    assert (gauge.mw(), gauge.name) == (None, "")
    assert "ina3221" in gauge.why
