"""A virtual microphone: what is played into it is what a program captures, bit for bit; a browser; and which tests come first."""

import os
import shutil
import signal
import subprocess
import time

import pytest

# A minute or more each, the longest first: .ci/test gives each worker a file at a time, and none should begin one when the others are done.
LONG = ("boot", "adaptation", "cli", "bench", "promotion", "trial", "wheels", "tensorrt", "pretrain", "round")


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


class NullSink:
    """A PulseAudio server of the test's own whose default input hears what `play()` plays: `mic:pulse` in `env`."""

    def __init__(self, folder, rate_hz):
        self._rate_hz = rate_hz
        self._socket = folder / "native"
        for name in ("run", "home"):
            (folder / name).mkdir(mode=0o700)
        self.env = {
            **os.environ,
            "HOME": str(folder / "home"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "PULSE_RUNTIME_PATH": str(folder / "run" / "pulse"),
            "PULSE_SERVER": f"unix:{self._socket}",
        }
        self.start()

    def start(self):
        """May be called again after `kill()`."""
        self._socket.unlink(missing_ok=True)
        # Without norewinds what is captured later than the first time is scrambled.
        sink = f"module-null-sink sink_name=kws format=s16le rate={self._rate_hz} channels=1 norewinds=1"
        native = f"module-native-protocol-unix socket={self._socket} auth-anonymous=1"
        command = ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", "--log-level=error", "-L", native, "-L", sink]
        self._server = subprocess.Popen(command, env=self.env, stderr=subprocess.DEVNULL)
        for _ in range(100):
            if subprocess.run(["pactl", "set-default-source", "kws.monitor"], env=self.env, capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        self.kill()
        pytest.skip("pulseaudio does not start here")

    def play(self, path):
        """Returns when all of it was played."""
        subprocess.run(["paplay", "--device=kws", str(path)], env=self.env, check=True, timeout=120)

    def suspend(self, yes):
        """The sink, and with it what listens to it."""
        subprocess.run(["pactl", "suspend-sink", "kws", str(int(yes))], env=self.env, check=True)

    def kill(self):
        self.signal(signal.SIGKILL)
        self._server.wait()

    def signal(self, number):
        self._server.send_signal(number)


@pytest.fixture
def null_sink(request, tmp_path):
    """At 16 kHz, or at the rate of `pytest.mark.parametrize("null_sink", [rate_hz], indirect=True)`."""
    missing = [program for program in ("pulseaudio", "pactl", "paplay") if not shutil.which(program)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install pulseaudio pulseaudio-utils libasound2-plugins)")
    sink = NullSink(tmp_path, getattr(request, "param", 16_000))
    yield sink
    sink.kill()


@pytest.fixture
def chromium(tmp_path):
    """`chromium(url, *flags)` opens a page in a headless browser: what it prints, and what it had to complain of."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium not installed (apt-get install chromium)")

    def look(url, *flags):
        own = [f"--user-data-dir={tmp_path / 'chromium'}", "--enable-logging=stderr", "--virtual-time-budget=4000", "--hide-scrollbars"]
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", *own, *flags, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]

    return look
