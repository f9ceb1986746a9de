"""DELIVER to an MQTT broker: Rhasspy's Hermes messages, and an event entity a keyword in Home Assistant. The only module that knows paho.

    hermes/hotword/KEYWORD/detected            each wake, as Rhasspy wants it; hermes/hotword/toggleOff and toggleOn are obeyed
    edgekws/SITE/wake/KEYWORD                  each wake, as `edgekws run --json` prints it
    edgekws/SITE/status                        online or offline, retained: offline while deaf, and said by the broker when we are gone;
                                               watched, as the broker may say it late, of a process before this one
    homeassistant/event/edgekws_SITE/…/config  what Home Assistant makes entities of, retained

While the broker is away wakes wait in memory, up to a bound; what finds no room is counted and said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgekws import __version__
from edgekws.errors import ConfigError, EdgekwsError, NotInstalled
from edgekws.sinks import Complaints, as_json
from edgekws.values import Event

log = logging.getLogger(__name__)

QUEUE_WAKES = 1000
KEEPALIVE_S = 30
RETRY_S = (1, 10)  # between attempts to connect: the first, the longest
CLOSE_S = 3.0  # for what waits to go out
LOOK_S = 2.0  # between looks for certificates that cannot be read yet
PORTS = {"mqtt": 1883, "mqtts": 8883}
TOGGLES = ("hermes/hotword/toggleOff", "hermes/hotword/toggleOn")


class MqttSink:
    """Connects, and connects again, on paho's own thread; `deliver` never waits.

    Raises:
        ConfigError: the URL or the site cannot be used.
        NotInstalled: the package is not installed.
    """

    def __init__(
        self, url: str, site: str, keywords: Callable[[], Iterable[str]], *, ca_file: str = "", discovery: bool = True, model: str = ""
    ) -> None:
        """User name and password come from systemd's credentials or the environment.

        Args:
            site: "" is this machine's name.
            keywords: gives what is enrolled; asked again at each model event. On the delivery's thread.
        """
        self._host, port, tls = _address(url)
        self._site = site or socket.gethostname().split(".")[0] or "edgekws"
        if not re.fullmatch(r"[\w.-]{1,64}", self._site):
            raise ConfigError(f"mqtt.site = {self._site!a}. Accepted: 1 to 64 letters, digits, dots, - and _")
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError as error:
            raise NotInstalled("the package paho-mqtt", "mqtt") from error
        self.dropped = 0
        """Wakes that found the queue full."""
        self._model, self._discovery = model, discovery
        self._enrolled = keywords
        self._keywords = dict.fromkeys(keywords())
        self._off: set[str] = set()  # reasons why Rhasspy wants no wakes
        self._deaf = False
        self._sent = self._acknowledged = 0
        self._outdated = False  # what was told at the connection, by what waited before it and goes out after it
        self._counting, self._telling = threading.Lock(), threading.Lock()
        self._complaints = Complaints()
        # A name of its own each time: two clients of one name throw each other out without end.
        self._client = Client(CallbackAPIVersion.VERSION2, f"edgekws-{os.urandom(6).hex()}")
        self._client.will_set(self._status, "offline", qos=1, retain=True)
        self._client.reconnect_delay_set(*RETRY_S)
        user, password = _credential("mqtt-username"), _credential("mqtt-password")
        if user:
            self._client.username_pw_set(user, password or None)
        self._port, self._tls, self._ca_file, self._begun = port, tls, ca_file, False
        if not tls and password and self._host not in ("localhost", "127.0.0.1", "::1"):
            log.warning("mqtt: the password goes to %s unencrypted. Accepted is mqtts:// too", self._host)
        self._client.on_connect = self._connected
        self._client.on_connect_fail = self._failed
        self._client.on_disconnect = self._disconnected
        self._client.on_publish = self._published
        self._client.on_message = self._told
        self._closed = threading.Event()
        self._begin()
        if not self._begun:
            threading.Thread(target=self._begin_later, name="mqtt certificates", daemon=True).start()

    def _begin_later(self) -> None:
        while not self._begun and not self._closed.wait(LOOK_S):
            self._begin()

    def _begin(self) -> None:
        """Connect, once the certificates can be read: they may lie on what is mounted after the start. Until then wakes wait."""
        try:
            if self._tls:
                self._client.tls_set_context(ssl.create_default_context(cafile=self._ca_file or None))
        except OSError as error:
            why = f"no certificates can be read from it ({error.strerror or error}); wakes wait for it"
            self._complaints.say(f"mqtt.ca_file = {self._ca_file!a}: {why}", kind="certificates")
            return
        self._begun = True
        self._client.connect_async(self._host, self._port, KEEPALIVE_S)
        self._client.loop_start()

    @property
    def _base(self) -> str:
        return f"edgekws/{self._site}"

    @property
    def _status(self) -> str:
        return f"{self._base}/status"

    def deliver(self, event: Event) -> None:
        """Raises EdgekwsError when the broker was away for too long."""
        if self._deaf != (event.kind == "deaf") and event.kind in ("deaf", "start", "gap", "wake"):
            self._deaf = not self._deaf
            if self._client.is_connected():
                self._tell_status()
        if event.kind == "model":
            if live := event.extra.get("what") == "live":
                self._model = event.model
            self._reconcile(again=live)
        if event.kind != "wake":
            return
        if self._waiting() >= 2 * QUEUE_WAKES:
            self.dropped += 1
            raise EdgekwsError(f"mqtt: {self._host} is away and {QUEUE_WAKES} wakes wait for it: {self.dropped} dropped")
        if event.keyword not in self._keywords:  # enrolled since, and the event that says so was dropped
            self._keywords[event.keyword] = None
            self._announce(event.keyword)
        hermes = {
            "modelId": event.keyword,
            "modelVersion": event.model,
            "modelType": "personal" if event.speaker else "universal",
            "currentSensitivity": round(event.threshold, 4),
            "siteId": self._site,
            "sessionId": None,
            "sendAudioCaptured": None,
            "lang": None,
            "customEntities": None,
        }
        if not self._off:
            self._publish(f"hermes/hotword/{_level(event.keyword)}/detected", json.dumps(hermes, ensure_ascii=False))
        told = {"event_type": "wake", **json.loads(as_json(event))}
        self._publish(f"{self._base}/wake/{_slug(event.keyword)}", json.dumps(told, ensure_ascii=False))

    def close(self) -> None:
        """What waits goes out if the broker is there; what does not is said."""
        self._deaf = True  # for good
        self._closed.set()
        if self._client.is_connected():
            self._tell_status()
        end_s = time.monotonic() + CLOSE_S
        while self._waiting() and self._client.is_connected() and time.monotonic() < end_s:
            time.sleep(0.01)
        if left := self._waiting():
            log.warning("mqtt: %s is away, so %d messages are lost", self._host, left)
        self._client.disconnect()
        ending = threading.Thread(target=self._client.loop_stop, daemon=True)  # it waits for paho's thread, and that for a name server
        ending.start()
        ending.join(CLOSE_S)

    # On paho's thread; an exception there would end it, and with it the connection.

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._complaints.say(
                f"mqtt: {self._host} refuses us: {reason}. Credentials are mqtt-username and mqtt-password", kind="refused"
            )
            return
        log.info("mqtt: connected to %s", self._host)
        self._off.clear()
        self._outdated = self._waiting() > 0  # paho sends what waits after what is told here
        self._tell_all()
        client.subscribe([(topic, 1) for topic in (*TOGGLES, self._status)])

    def _failed(self, *_: Any) -> None:
        error = sys.exc_info()[1]  # paho calls this while it handles that, and hands nothing over
        self._away(f"cannot be reached ({error})" if error else "cannot be reached")

    def _disconnected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._away(f"went away ({reason})")

    def _away(self, why: str) -> None:
        self._complaints.say(f"mqtt: {self._host} {why}; wakes wait for it", kind="away")

    def _published(self, *_: Any) -> None:
        with self._counting:
            self._acknowledged += 1
        if self._outdated and not self._waiting():
            self._outdated = False
            # Not here: paho holds its messages' lock, for which the delivery's thread may wait while it holds `_telling`.
            try:
                threading.Thread(target=self._tell_all, daemon=True).start()
            except RuntimeError:  # the unit's TasksMax=; at the next acknowledgement then
                self._outdated = True

    def _told(self, client: Any, data: Any, message: Any) -> None:
        if message.topic in TOGGLES:
            try:
                told = json.loads(message.payload)
                if told["siteId"] == self._site:
                    reason = str(told.get("reason", ""))[:100]
                    (self._off.add if message.topic == TOGGLES[0] else self._off.discard)(reason)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                self._complaints.say(f"mqtt: {message.topic}: not understood", kind="toggle")
        elif message.topic == self._status:
            # Of a session before ours that the broker only now finds dead, or of another process of this site that ended. Nothing but
            # offline is answered, and only while we hear, so that two processes never answer each other.
            if message.payload == b"offline" and not self._deaf:
                self._tell_status()
        elif message.retain and message.payload and message.topic not in {self._config_topic(keyword) for keyword in list(self._keywords)}:
            # Of a keyword that is no longer enrolled. One that is not retained another process of this site announces just now.
            self._publish(message.topic, "", retain=True)
            entity = message.topic.split("/")[-2]
            self._complaints.say(
                f"mqtt: {self._site} had an entity {entity}, which is not enrolled here, so it was removed. If it is another machine's,"
                " give each its own [mqtt] site",
                kind="site",
            )

    # On any thread.

    def _tell_all(self) -> None:
        self._tell_status()
        if self._discovery:
            self._client.subscribe(f"homeassistant/event/{self._node}/+/config", 1)  # each time it brings what is retained
            for keyword in list(self._keywords):
                self._announce(keyword)

    def _tell_status(self) -> None:
        with self._telling:  # else the thread that read the older state might be the last to tell
            self._publish(self._status, "offline" if self._deaf else "online", retain=True)

    def _reconcile(self, *, again: bool) -> None:
        """Home Assistant is told before the first wake of a keyword: it begins to listen after it has read the config.

        again: of each one, as what is retained names another version.
        """
        before, self._keywords = self._keywords, dict.fromkeys(self._enrolled())
        if not self._discovery or not self._client.is_connected():  # `_connected` tells all of it
            return
        for keyword in self._keywords:
            if again or keyword not in before:
                self._announce(keyword)
        for keyword in before:
            if keyword not in self._keywords:
                self._publish(self._config_topic(keyword), "", retain=True)

    def _announce(self, keyword: str) -> None:
        if not self._discovery:
            return
        name = f"edgekws {self._site}"
        config = {
            "name": keyword,
            "unique_id": f"{self._node}_{_slug(keyword)}",
            "state_topic": f"{self._base}/wake/{_slug(keyword)}",
            "event_types": ["wake"],
            "icon": "mdi:account-voice",
            "qos": 1,
            "availability_topic": self._status,
            "device": {
                "identifiers": [self._node],
                "name": name,
                "manufacturer": "edgekws",
                "model": self._model,
                "sw_version": __version__,
            },
            "origin": {"name": "edgekws", "sw_version": __version__},
        }
        self._publish(self._config_topic(keyword), json.dumps(config, ensure_ascii=False), retain=True)

    @property
    def _node(self) -> str:
        return f"edgekws_{_slug(self._site)}"

    def _config_topic(self, keyword: str) -> str:
        return f"homeassistant/event/{self._node}/{_slug(keyword)}/config"

    def _publish(self, topic: str, text: str, *, retain: bool = False) -> None:
        with self._counting:
            self._sent += 1
        self._client.publish(topic, text.encode(errors="replace"), qos=1, retain=retain)

    def _waiting(self) -> int:
        """Messages that the broker has not acknowledged."""
        return self._sent - self._acknowledged


def _address(url: str) -> tuple[str, int, bool]:
    """Host, port and whether by TLS."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        host.encode("idna")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "mqtt.url: a password does not belong in a file that others read. Put it in the credential mqtt-password, see docs"
            )
        if not host or parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(f"mqtt.url = {url[:80]!a}. Accepted: mqtt://HOST, mqtts://HOST, or with :PORT") from None
    return host, port, parts.scheme == "mqtts"


def _credential(name: str) -> str:
    """From systemd (LoadCredential=), else from EDGEKWS_MQTT_USERNAME or EDGEKWS_MQTT_PASSWORD; "" = none."""
    if folder := os.environ.get("CREDENTIALS_DIRECTORY"):
        try:
            return (Path(folder) / name).read_text().rstrip("\n")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise ConfigError(f"the credential {name} cannot be read ({error})") from error
    return os.environ.get("EDGEKWS_" + name.upper().replace("-", "_"), "")


def _level(name: str) -> str:
    """One level of a topic."""
    return re.sub(r"[/+#\s]+", "_", name)


def _slug(name: str) -> str:
    """Letters, digits, - and _, as Home Assistant wants it; never the same for two names."""
    if re.fullmatch("[A-Za-z0-9 -]+", name):
        return name.replace(" ", "_")
    return f"{re.sub('[^A-Za-z0-9-]+', '_', name)}_{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:6]}"
