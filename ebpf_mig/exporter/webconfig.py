# SPDX-License-Identifier: Apache-2.0
"""`--web.config.file`: TLS, client certificates and users, in the YAML that Prometheus's exporter-toolkit reads.

In: a file. Out: an SSL context and a function that checks Authorization headers. Needs PyYAML, and bcrypt for users
(the extra `ebpf-mig[web]`). Unknown keys are refused: a misspelt restriction must not be ignored. Any error in a file
is one UsageError. Only regular files of a bounded size are read, so `load` does not block.
Format: https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import ssl
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ebpf_mig.errors import EbpfMigError, PreflightError, UsageError
from ebpf_mig.exporter.web import Authorise
from ebpf_mig.linux import procfs
from ebpf_mig.text import printable

_EXTRA = "pip install 'ebpf-mig[web]', or apt-get install python3-yaml python3-bcrypt"
_TLS_KEYS = {"cert_file", "key_file", "client_ca_file", "client_auth_type", "min_version", "max_version"}
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_REMEMBERED = 100
MAX_BYTES = 64 << 10
"""Of a configuration. Parsing this much takes a second."""
MAX_COST = 15
"""Of a bcrypt hash. Each step doubles the time; at this one a guess takes about two seconds."""
_COST = re.compile(r"\$2[abxy]?\$([0-9]{2})\$")


@dataclass(frozen=True)
class WebConfig:
    """What the file asks for; None is no restriction."""

    tls: ssl.SSLContext | None
    authorise: Authorise | None


def load(path: str) -> WebConfig:
    """Reads the file and the files it names. UsageError if any of it cannot be applied."""
    try:
        import yaml
    except ImportError as error:
        raise PreflightError("--web.config.file needs PyYAML", _EXTRA) from error
    try:
        with _regular(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UsageError(f"{printable(path)} has more than {MAX_BYTES} bytes")
        content = yaml.safe_load(text.decode()) or {}
        return _understood(content, path)
    except EbpfMigError:
        raise
    except Exception as error:  # PyYAML passes on any error of a type's constructor: ValueError, RecursionError, ...
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"cannot read {printable(path)}: {printable(why, 300)}") from error


def _understood(content: Any, path: str) -> WebConfig:
    _only(content, {"tls_server_config", "basic_auth_users"}, path)
    tls = content.get("tls_server_config")
    users = content.get("basic_auth_users")
    return WebConfig(
        None if tls is None else _context(tls, Path(path).absolute().parent),
        None if not users else _Users(users).authorise,
    )


def _regular(path: str | Path) -> BinaryIO:
    """The file, open for reading. OSError if it is not a regular file. Opening a FIFO does not block."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{printable(str(path))} is not a regular file")
    return os.fdopen(fd, "rb")


def _only(content: Any, known: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise UsageError(f"{printable(where)} is not a mapping")
    unknown = sorted(str(key) for key in content.keys() - known)
    if unknown:
        raise UsageError(f"{printable(where)}: {printable(unknown[0])} is not supported", f"known: {sorted(known)}")


def _context(tls: dict[str, Any], directory: Path) -> ssl.SSLContext:
    _only(tls, _TLS_KEYS, "tls_server_config")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.minimum_version = _VERSIONS[tls.get("min_version", "TLS12")]
        context.maximum_version = _VERSIONS[tls.get("max_version", "TLS13")]
        wanted = "RequireAndVerifyClientCert" if "client_ca_file" in tls else "NoClientCert"
        mode = _CLIENT_AUTH[tls.get("client_auth_type", wanted)]
        with _regular(directory / tls["cert_file"]) as cert, _regular(directory / tls["key_file"]) as key:
            context.load_cert_chain(
                _again(cert), _again(key), password=""
            )  # otherwise OpenSSL asks for it at the terminal
        if mode != ssl.CERT_NONE:
            with _regular(directory / tls["client_ca_file"]) as authority:
                context.load_verify_locations(_again(authority))
        context.verify_mode = mode
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UsageError(f"tls_server_config: {type(error).__name__}: {printable(str(error))}") from error
    return context


def _again(file: BinaryIO) -> str:
    """A path to an open file, for libraries that only take paths. It cannot lead to another file."""
    return procfs.path("self", "fd", file.fileno())


class _Users:
    """Checks passwords. bcrypt is slow by design, so a right password is remembered as a keyed hash."""

    def __init__(self, users: dict[str, str]) -> None:
        try:
            import bcrypt
        except ImportError as error:
            raise PreflightError("basic_auth_users needs bcrypt", _EXTRA) from error
        self._check = bcrypt.checkpw
        self._key = os.urandom(32)
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self._users = {str(name).encode(): secret.encode("ascii") for name, secret in users.items()}
            for name, secret in self._users.items():
                cost = _COST.match(secret.decode())
                if cost and int(cost[1]) > MAX_COST:
                    raise UsageError(f"the bcrypt cost of user {printable(name.decode())} is more than {MAX_COST}")
                bcrypt.checkpw(b"", secret)
        except (AttributeError, ValueError) as error:
            raise UsageError("basic_auth_users is not a mapping of names to bcrypt hashes") from error

    def authorise(self, header: str | None) -> bool:
        """Whether an Authorization header names a user with the right password."""
        kind, _, encoded = (header or "").partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            name, _, password = base64.b64decode(encoded, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        mark = hmac.digest(self._key, hashlib.sha256(name).digest() + password, "sha256")
        with self._lock:  # one at a time: guessing must not use all CPUs
            if mark in self._right:
                return True
            secret = self._users.get(name)
            try:
                # For an unknown user another hash is checked, so that the time does not reveal which names exist.
                right = self._check(password[:72], secret or next(iter(self._users.values())))
            except ValueError:
                return False
            if not right or secret is None:
                return False
            self._right[mark] = None
            if len(self._right) > _REMEMBERED:
                self._right.popitem(last=False)
            return True
