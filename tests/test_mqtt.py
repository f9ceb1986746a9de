"""Against a real broker (mosquitto), which goes away and comes back."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("paho")
import paho.mqtt.client as paho

from edgekws import mqtt
from edgekws.errors import ConfigError, EdgekwsError
from edgekws.mqtt import MqttSink
from edgekws.promotion import model_event
from edgekws.sinks import Delivery
from edgekws.values import Event

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


def wake(i=0, keyword="hey küche"):
    return Event(keyword, "ann", 1.25, 0.7, 1000.5 + i, 4.2, 0.3, "edge-3")


class Broker:
    def __init__(self, folder, *more):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        lines = [f"listener {self.port} 127.0.0.1", "persistence true", f"persistence_location {folder}/", "max_queued_messages 0", *more]
        if not more:
            lines.append("allow_anonymous true")
        if os.getuid() == 0:  # else it would become another user, who may not write here
            lines.append("user root")
        (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", self.folder / "mosquitto.conf"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("mosquitto does not start")

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


class Subscriber:
    """Somebody whose session the broker keeps while it is away."""

    def __init__(self, port, **more):
        self.messages = []
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, "subscriber", clean_session=False)
        for name, value in more.items():
            getattr(self.client, name)(*value)
        subscribed = threading.Event()
        self.client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.on_message = lambda client, data, message: self.messages.append(message)
        self.client.reconnect_delay_set(1, 1)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert subscribed.wait(30)

    def of(self, topic):
        return [
            json.loads(one.payload) if one.payload[:1] == b"{" else one.payload.decode()
            for one in list(self.messages)
            if one.topic == topic
        ]

    def wait(self, topic, count, seconds=90):
        end_s = time.monotonic() + seconds
        while len(self.of(topic)) < count and time.monotonic() < end_s:
            time.sleep(0.05)
        return self.of(topic)

    def turns(self, count, seconds=90):
        """The status as it changed; one that is told twice is no turn."""
        end_s = time.monotonic() + seconds
        while len(found := [one for one, _ in itertools.groupby(self.of(STATUS))]) < count and time.monotonic() < end_s:
            time.sleep(0.05)
        return found

    def say(self, topic, payload):
        self.client.publish(topic, payload, qos=1, retain=True).wait_for_publish(30)

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def broker(tmp_path):
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    broker = Broker(tmp_path)
    yield broker
    broker.process.kill()
    broker.process.wait()


@pytest.fixture
def subscriber(broker):
    subscriber = Subscriber(broker.port)
    yield subscriber
    subscriber.close()


def sink(broker, *keywords, **more):
    return MqttSink(f"mqtt://127.0.0.1:{broker.port}", "kitchen", lambda: keywords, **{"model": "edge-3", **more})


WAKES = f"edgekws/kitchen/wake/{mqtt._slug('hey küche')}"
HERMES = "hermes/hotword/hey_küche/detected"
STATUS = "edgekws/kitchen/status"


@contextlib.contextmanager
def another(broker):
    """A process of the same site; what it leaves at the broker when it is killed is the session of one whose power went."""
    script = f"from edgekws.mqtt import MqttSink; import time; MqttSink('mqtt://127.0.0.1:{broker.port}', 'kitchen', list); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script])
    yield process
    process.kill()
    process.wait()


def test_a_wake_reaches_rhasspy_and_home_assistant(broker, subscriber):
    delivery = Delivery([sink(broker, "hey küche")])
    delivery.put(wake())
    (hermes,), (event,) = subscriber.wait(HERMES, 1), subscriber.wait(WAKES, 1)
    delivery.close()

    assert (hermes["modelId"], hermes["siteId"], hermes["modelType"]) == ("hey küche", "kitchen", "personal")
    assert (event["event_type"], event["keyword"], event["speaker"], event["time_s"]) == ("wake", "hey küche", "ann", 1000.5)


def test_home_assistant_finds_an_entity_for_each_keyword_and_loses_those_that_are_gone(broker, subscriber):
    first = sink(broker, "hey küche", "alexa")
    gone = "homeassistant/event/edgekws_kitchen/alexa/config"
    assert subscriber.wait(gone, 1)[0]["name"] == "alexa"
    first.close()
    second = sink(broker, "hey küche")
    assert subscriber.wait(gone, 2)[-1] == ""
    second.deliver(wake(keyword="enrolled later"))
    (later,) = subscriber.wait("homeassistant/event/edgekws_kitchen/enrolled_later/config", 1)
    second.close()

    configs = [one for one in subscriber.messages if one.topic.endswith("/config") and one.payload]
    for message in configs:
        config = json.loads(message.payload)
        assert config["state_topic"].startswith("edgekws/kitchen/wake/")
        assert (config["event_types"], config["availability_topic"]) == (["wake"], "edgekws/kitchen/status")
        assert config["device"]["identifiers"] == ["edgekws_kitchen"]
    assert later["name"] == "enrolled later"


def test_what_another_announced_a_moment_ago_stays(broker, subscriber):
    """A second process of this site, for which more is enrolled."""
    here = sink(broker, "hey küche")
    mine, others = (f"homeassistant/event/edgekws_kitchen/{slug}/config" for slug in (mqtt._slug("hey küche"), "alexa"))
    subscriber.wait(mine, 1)
    subscriber.say(others, "{}")
    subscriber.say(STATUS, "offline")  # is answered after what came before it
    subscriber.turns(3)
    here.close()

    assert subscriber.of(others) == [{}]


def test_who_removes_what_another_machine_of_the_same_site_announced_says_so(broker, subscriber, caplog):
    one = sink(broker, "alexa", "hey küche")
    subscriber.wait("homeassistant/event/edgekws_kitchen/alexa/config", 1)
    other = sink(broker, "jarvis")
    subscriber.wait("homeassistant/event/edgekws_kitchen/alexa/config", 2)
    other.close()
    one.close()

    assert "each its own [mqtt] site" in caplog.text
    assert "alexa" in caplog.text
    assert caplog.text.count("[mqtt] site") == 1


def test_a_keyword_has_its_entity_before_its_first_wake_and_loses_it_when_it_is_gone(broker, subscriber):
    enrolled = ["alexa", "hey küche"]
    one = MqttSink(f"mqtt://127.0.0.1:{broker.port}", "kitchen", lambda: list(enrolled), model="edge-3")
    config = "homeassistant/event/edgekws_kitchen/{}/config".format
    assert subscriber.wait(config("alexa"), 1)[0]["name"] == "alexa"
    enrolled[:] = ["hey küche", "enrolled later"]
    one.deliver(model_event("edge-3", "reloaded", 1000.5))

    assert subscriber.wait(config("enrolled_later"), 1)[0]["name"] == "enrolled later"
    assert subscriber.wait(config("alexa"), 2)[1:] == [""]
    one.deliver(wake(keyword="enrolled later"))
    subscriber.wait("edgekws/kitchen/wake/enrolled_later", 1)
    assert len(subscriber.of(config("enrolled_later"))) == len(subscriber.of(config(mqtt._slug("hey küche")))) == 1
    one.close()


def test_home_assistant_is_told_the_version_that_listens_now(broker, subscriber):
    one = sink(broker, "alexa")
    config = "homeassistant/event/edgekws_kitchen/alexa/config"
    subscriber.wait(config, 1)
    one.deliver(model_event("0001-abcdef", "live", 1000.5, before="edge-3"))
    told = subscriber.wait(config, 2)
    one.close()

    assert [config["device"]["model"] for config in told] == ["edge-3", "0001-abcdef"]


def test_without_discovery_nothing_is_told_to_home_assistant(broker, subscriber):
    enrolled = ["alexa"]
    one = MqttSink(f"mqtt://127.0.0.1:{broker.port}", "kitchen", lambda: list(enrolled), discovery=False)
    subscriber.turns(1)
    enrolled[:] = ["enrolled later"]
    one.deliver(model_event("edge-3", "live", 1000.5))
    one.deliver(wake(keyword="enrolled later"))
    subscriber.wait("edgekws/kitchen/wake/enrolled_later", 1)
    one.close()

    assert [message.topic for message in subscriber.messages if message.topic.startswith("homeassistant/")] == []


def test_it_is_online_while_it_runs_and_the_broker_says_when_it_was_killed(broker, subscriber):
    with another(broker):
        assert subscriber.wait("edgekws/kitchen/status", 1) == ["online"]
    assert subscriber.wait("edgekws/kitchen/status", 2)[1:] == ["offline"]

    polite = sink(broker)
    assert subscriber.wait("edgekws/kitchen/status", 3)[2:] == ["online"]
    polite.close()
    assert subscriber.wait("edgekws/kitchen/status", 4)[3:] == ["offline"]


def test_it_is_offline_while_it_is_deaf(broker, subscriber):
    one = sink(broker)
    said = ["online"]
    subscriber.turns(1)
    for kind, now in (("deaf", "offline"), ("deaf", None), ("start", "online"), ("deaf", "offline"), ("gap", "online"), ("wake", None)):
        one.deliver(dataclasses.replace(wake(), kind=kind))
        said += [now] if now else []
        assert subscriber.turns(len(said)) == said
    one.close()


def test_a_stale_offline_is_answered(broker, subscriber):
    """The broker says it of the session before, which it finds dead once this one is there; and so says a second process that ends."""
    with another(broker):
        subscriber.wait(STATUS, 1)
        here = sink(broker)
        subscriber.wait(STATUS, 2)
    assert subscriber.wait(STATUS, 4) == ["online", "online", "offline", "online"]
    second = sink(broker)
    subscriber.wait(STATUS, 5)
    second.close()
    assert subscriber.turns(5) == ["online", "offline", "online", "offline", "online"]
    here.close()
    assert subscriber.turns(6)[5:] == ["offline"]


def test_a_stale_offline_that_is_retained_is_answered_at_the_next_start(broker, subscriber):
    subscriber.say(STATUS, "offline")
    here = sink(broker)
    assert subscriber.turns(2) == ["offline", "online"]
    here.close()
    assert subscriber.turns(3)[2:] == ["offline"]


def test_an_offline_is_answered_neither_while_deaf_nor_at_the_end_nor_is_anything_else(broker, subscriber):
    one = sink(broker)
    subscriber.turns(1)
    one.deliver(dataclasses.replace(wake(), kind="deaf"))
    subscriber.turns(2)
    for status in ("offline", "online", "junk", ""):
        subscriber.say(STATUS, status)
    time.sleep(1)
    assert subscriber.turns(5) == ["online", "offline", "online", "junk", ""]
    one.deliver(dataclasses.replace(wake(), kind="start"))
    assert subscriber.turns(6)[5:] == ["online"]
    one.close()
    assert subscriber.turns(7)[6:] == ["offline"]
    time.sleep(1)
    assert subscriber.turns(7)[6:] == ["offline"]


def test_no_wake_is_lost_while_the_broker_is_restarted(broker, subscriber):
    """A hundred a second, for five seconds, of which it is away for some; each comes once or, as QoS 1 may, twice."""
    delivery = Delivery([sink(broker, "hey küche")])
    for i in range(500):
        if i == 100:
            broker.stop()
        if i == 300:
            broker.start()
        delivery.put(wake(i))
        time.sleep(0.01)
    end_s = time.monotonic() + 90
    while len({one["time_s"] for one in subscriber.of(WAKES)}) < 500 and time.monotonic() < end_s:
        time.sleep(0.1)
    delivery.close()

    assert {one["time_s"] for one in subscriber.of(WAKES)} == {1000.5 + i for i in range(500)}
    assert delivery.dropped == 0


def test_what_waited_in_an_outage_that_was_not_noticed_at_once_is_not_the_last_that_is_told(tmp_path, caplog):
    """It hangs before it goes: what was told then comes after it is back, and is no longer so."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    broker = Broker(tmp_path)
    enrolled = ["alexa", "removed and enrolled again"]
    one = MqttSink(f"mqtt://127.0.0.1:{broker.port}", "kitchen", lambda: list(enrolled))
    until(one._client.is_connected)
    until(lambda: not one._waiting())

    def now(kind, *keywords):
        enrolled[:] = keywords
        one.deliver(dataclasses.replace(wake(), kind=kind))
        one.deliver(model_event("edge-3", "reloaded", 1000.5))

    broker.process.send_signal(signal.SIGSTOP)
    now("deaf", "alexa")
    now("start", "alexa", "a ghost")
    broker.process.kill()
    broker.process.wait()
    until(lambda: "went away" in caplog.text)
    now("deaf", "alexa", "removed and enrolled again")
    broker.start()
    until(one._client.is_connected)
    until(lambda: not one._waiting())  # what was old is through
    subscriber = Subscriber(broker.port)

    def retained():
        entities = {message.topic.split("/")[3]: message.payload for message in list(subscriber.messages) if "/config" in message.topic}
        return subscriber.of(STATUS)[-1:], {entity for entity, config in entities.items() if config}

    until(lambda: retained() == (["offline"], {"alexa", "removed_and_enrolled_again"}), 20)
    assert retained() == (["offline"], {"alexa", "removed_and_enrolled_again"})
    one.close()
    subscriber.close()
    broker.stop()


def test_where_no_thread_can_be_begun_what_was_outdated_is_told_at_the_next_acknowledgement(monkeypatch):
    """A fake: the unit's TasksMax= would stop the tests' own threads too."""
    begun = []

    class Thread:
        def __init__(self, target, daemon):
            self.target = target

        def start(self):
            begun.append(self.target)
            if len(begun) == 1:
                raise RuntimeError("can't start new thread")

    one = MqttSink("mqtt://127.0.0.1:1", "kitchen", list)
    try:
        one._outdated = True
        with monkeypatch.context() as patch:
            patch.setattr(mqtt.threading, "Thread", Thread)
            patch.setattr(one, "_waiting", lambda: 0)
            one._published()
            one._published()
            one._published()
    finally:
        one.close()

    assert begun == [one._tell_all] * 2


def test_it_ends_though_a_name_server_does_not_answer(monkeypatch):
    monkeypatch.setattr(mqtt, "CLOSE_S", 0.2)
    asked, answered = threading.Event(), threading.Event()

    def lookup(*_, **__):
        asked.set()
        answered.wait(20)
        answered.set()
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    one = MqttSink("mqtt://broker.example", "kitchen", list)
    assert asked.wait(30)
    one.close()

    assert not answered.is_set()
    answered.set()


def test_a_broker_that_is_away_for_too_long_costs_wakes_that_are_counted_and_said(monkeypatch, caplog):
    monkeypatch.setattr(mqtt, "QUEUE_WAKES", 10)
    away = MqttSink("mqtt://127.0.0.1:1", "kitchen", list, discovery=False)
    delivery = Delivery([away])
    for i in range(30):
        delivery.put(wake(i))
    delivery.close()

    assert delivery.drops() == {"queue": 0, "mqtt": 20}
    assert "127.0.0.1 is away and 10 wakes wait for it: 1 dropped" in caplog.text
    assert "20 messages are lost" in caplog.text


def test_it_starts_before_its_broker(tmp_path):
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    broker = Broker(tmp_path)
    broker.stop()
    early = sink(broker, "hey küche")
    broker.start()
    subscriber = Subscriber(broker.port)
    assert subscriber.wait("edgekws/kitchen/status", 1) == ["online"]
    early.deliver(wake())

    assert len(subscriber.wait(WAKES, 1)) == 1
    early.close()
    subscriber.close()
    broker.stop()


def test_rhasspy_can_ask_for_silence_and_home_assistant_still_hears(broker, subscriber):
    one = sink(broker, "hey küche")
    subscriber.wait("edgekws/kitchen/status", 1)

    def toggle(what, site="kitchen", text=None):
        payload = json.dumps({"siteId": site, "reason": "dialogueSession"}) if text is None else text
        subscriber.client.publish(f"hermes/hotword/{what}", payload, qos=1).wait_for_publish(30)
        time.sleep(0.3)

    toggle("toggleOff", "elsewhere")
    toggle("toggleOff", text="junk")
    toggle("toggleOff", text="[]")
    one.deliver(wake(0))
    toggle("toggleOff")
    one.deliver(wake(1))
    toggle("toggleOn")
    one.deliver(wake(2))
    subscriber.wait(HERMES, 2)
    one.close()

    assert len(subscriber.wait(WAKES, 3)) == 3
    assert len(subscriber.of(HERMES)) == 2


@pytest.mark.parametrize("source", ["systemd", "environment"])
def test_credentials_come_from_systemd_or_the_environment(tmp_path, monkeypatch, caplog, source):
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    passwords = tmp_path / "passwords"
    subprocess.run([shutil.which("mosquitto_passwd"), "-c", "-b", passwords, "kws", "secret"], check=True)
    broker = Broker(tmp_path, "allow_anonymous false", f"password_file {passwords}")
    subscriber = Subscriber(broker.port, username_pw_set=("kws", "secret"))
    if source == "systemd":
        (tmp_path / "mqtt-username").write_text("kws\n")
        (tmp_path / "mqtt-password").write_text("secret\n")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    else:
        monkeypatch.setenv("EDGEKWS_MQTT_USERNAME", "kws")
        monkeypatch.setenv("EDGEKWS_MQTT_PASSWORD", "secret")
    allowed = sink(broker)

    assert subscriber.wait("edgekws/kitchen/status", 1) == ["online"]
    allowed.close()
    subscriber.close()
    broker.stop()


def test_a_refusal_is_said(tmp_path, caplog):
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    broker = Broker(tmp_path, "allow_anonymous false")
    refused = sink(broker)
    end_s = time.monotonic() + 90
    while "refuses us: Not authorized" not in caplog.text and time.monotonic() < end_s:
        time.sleep(0.1)
    refused.close()
    broker.stop()

    assert "refuses us: Not authorized. Credentials are mqtt-username and mqtt-password" in caplog.text


def until(true, seconds=90):
    end_s = time.monotonic() + seconds
    while not true() and time.monotonic() < end_s:
        time.sleep(0.05)


def test_why_a_broker_cannot_be_reached_is_said(caplog):
    away = MqttSink("mqtt://127.0.0.1:1", "kitchen", list)
    until(lambda: "cannot be reached" in caplog.text)
    away.close()

    assert "mqtt: 127.0.0.1 cannot be reached ([Errno 111] Connection refused); wakes wait for it" in caplog.text


def test_by_tls_only_a_broker_whose_certificate_is_trusted_hears_anything_and_one_that_comes_later_is_looked_for(tmp_path, caplog):
    if MOSQUITTO is None or shutil.which("openssl") is None:
        pytest.skip("mosquitto or openssl is not installed (apt-get install mosquitto openssl)")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    broker = Broker(tmp_path, "allow_anonymous true", f"keyfile {key}", f"certfile {certificate}")
    subscriber = Subscriber(broker.port, tls_set=(str(certificate),))
    url = f"mqtts://127.0.0.1:{broker.port}"
    distrustful = MqttSink(url, "elsewhere", list)
    trusting = MqttSink(url, "kitchen", list, ca_file=str(certificate))
    later = MqttSink(url, "later", list, ca_file=str(tmp_path / "stick.pem"))
    later.deliver(wake())
    shutil.copy(certificate, tmp_path / "stick.pem")  # as where it is mounted after the start
    assert subscriber.wait("edgekws/later/status", 1)[0] == "online"  # though nothing happens
    later.deliver(wake(1))

    assert subscriber.wait("edgekws/kitchen/status", 1) == ["online"]
    assert subscriber.of("edgekws/elsewhere/status") == []
    until(lambda: "cannot be reached" in caplog.text)
    assert "cannot be reached ([SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate" in caplog.text
    assert "stick.pem': no certificates can be read from it (No such file or directory)" in caplog.text
    assert len(subscriber.wait(WAKES.replace("kitchen", "later"), 2)) == 2
    for one in (trusting, distrustful, later):
        one.close()
    subscriber.close()
    broker.stop()


@pytest.mark.parametrize(
    "url",
    [
        "broker",
        "http://broker",
        "mqtt://",
        "mqtt://broker:99999",
        "mqtt://broker/topic",
        "mqtt://[::1",
        "mqtt://" + "x" * 70 + ".de",
        "mqtt:\0",
    ],
)
def test_a_url_that_is_none_is_a_configuration_error(url):
    with pytest.raises(ConfigError, match="Accepted: mqtt://HOST"):
        MqttSink(url, "kitchen", list)


def test_what_cannot_be_used_is_a_configuration_error():
    with pytest.raises(ConfigError, match="a password does not belong in a file"):
        MqttSink("mqtt://me:secret@broker", "kitchen", list)
    with pytest.raises(ConfigError, match=r"mqtt\.site = 'a/b'"):
        MqttSink("mqtt://broker", "a/b", list)


def test_names_that_differ_never_share_a_topic():
    names = ["hey küche", "hey köche", "hey k_che", "hey_k_che", "a/b", "a+b", "a b", "a_b", "日本", "中国"]

    assert len({mqtt._slug(name) for name in names}) == len(names)


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    with pytest.raises(EdgekwsError, match=r"pip install 'edgekws\[mqtt\]'"):
        MqttSink("mqtt://127.0.0.1:1", "kitchen", list)
