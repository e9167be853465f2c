"""How far this machine's clock is off, compared with the run store and with a time server."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from cost.errors import SlmError
from trainer.run_store.base import Store

WARN_SECONDS = 5.0
FAIL_SECONDS = 600.0
"""Well before signed requests are refused: S3 allows 15 minutes (RequestTimeTooSkewed)."""
TIME_SERVER = ("pool.ntp.org", 123)
ANSWER_SECONDS = 3.0
NTP_EPOCH = 2_208_988_800
"""Seconds from 1900 to 1970."""
CLIENT = b"\x23" + 47 * b"\0"
"""A request of version 4, mode 3 (RFC 5905)."""
S3 = "https://s3.amazonaws.com"
PROBE_KEY = "doctor/clock-"


@dataclass(frozen=True, slots=True)
class Skew:
    """Their clock minus ours."""

    source: str
    seconds: float
    uncertain_seconds: float


def store_skew(store: Store, folder: Path | None) -> Skew | str:
    """From a file's time in a directory store, or the Date of an S3 reply; or why it is unknown."""
    if folder is not None:
        return folder_skew(store, folder)
    return http_skew(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or S3)


def folder_skew(store: Store, folder: Path) -> Skew | str:
    """A network file system stamps files with its server's clock."""
    key = f"{PROBE_KEY}{secrets.token_hex(8)}"
    try:
        before = time.time()
        store.write(key, b"now")
        after = time.time()
        stamped = folder.joinpath(*key.split("/")).stat().st_mtime
    except (SlmError, OSError) as error:
        return f"the store's clock is unknown: {error}"
    finally:
        with suppress(SlmError, OSError):
            store.delete(key)
    return Skew("the store's files", stamped - (before + after) / 2, (after - before) / 2)


def http_skew(url: str) -> Skew | str:
    """From the Date, to the second, that every reply carries, also a refusal."""
    before = time.time()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")
    except (OSError, ValueError) as error:
        return f"{urlsplit(url).netloc} does not answer ({error})"
    after = time.time()
    if date is None:
        return f"{urlsplit(url).netloc} does not say its time"
    stamped = parsedate_to_datetime(date).timestamp() + 0.5  # it leaves out the fraction
    return Skew(f"the store at {urlsplit(url).netloc}", stamped - (before + after) / 2, 0.5 + (after - before) / 2)


def time_server_skew(host: str, port: int, *, seconds: float = ANSWER_SECONDS) -> Skew | str:
    """From one request to an NTP server; in a thread, since looking up its name may take longer than the reply."""
    found: list[Skew] = []
    asking = threading.Thread(target=_ask, args=(host, port, seconds, found), daemon=True)
    asking.start()
    asking.join(seconds + 1)
    return found[0] if found else f"no time server is reachable ({host})"


def _ask(host: str, port: int, seconds: float, found: list[Skew]) -> None:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.settimeout(seconds)
        asked.connect((host, port))
        before = time.time()
        asked.send(CLIENT)
        answer = asked.recv(512)
        after = time.time()
        if len(answer) >= 48 and (whole := struct.unpack("!I", answer[40:44])[0]):
            theirs = whole - NTP_EPOCH + struct.unpack("!I", answer[44:48])[0] / 2**32
            found.append(Skew(f"{host} (NTP)", theirs - (before + after) / 2, (after - before) / 2))
