"""Checks of PEM files that the server and its clients share."""

from __future__ import annotations

import ssl
from pathlib import Path

from gpt_dist.errors import UsageError

CERTIFICATE, KEY = b"CERTIFICATE-----", b"PRIVATE KEY-----"


def check_files(
    cert: Path | None,
    key: Path | None,
    ca: Path | None,
    cert_flag: str = "--tls-cert",
    key_flag: str = "--tls-key",
) -> None:
    """Check that TLS files are what their flags say.

    Args:
        cert: certificate chain (PEM).
        key: its private key (PEM).
        ca: certificates of authorities (PEM).
        cert_flag: the option that names the certificate.
        key_flag: the option that names the key.

    Raises:
        UsageError: naming the flag and the file.
        OSError: a file cannot be read.
    """
    if (cert is None) != (key is None):
        raise UsageError(f"{cert_flag} and {key_flag} must be given together")
    holds = {
        path: {mark for mark in (CERTIFICATE, KEY) if mark in path.read_bytes()}
        for path in (cert, key, ca)
        if path is not None
    }
    if cert and key and (holds[cert], holds[key]) == ({KEY}, {CERTIFICATE}):
        raise UsageError(
            f"{cert_flag} {cert} is a private key, and {key_flag} {key} is a certificate: swap them"
        )
    for flag, path, mark, name in (
        (cert_flag, cert, CERTIFICATE, "certificate"),
        (key_flag, key, KEY, "private key"),
        ("--tls-ca", ca, CERTIFICATE, "certificate"),
    ):
        if path is not None and mark not in holds[path]:
            raise UsageError(f"{flag} {path}: contains no {name} (PEM)")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    flags = f"{cert_flag} {cert}, {key_flag} {key}"
    try:
        if cert is not None:
            context.load_cert_chain(cert, key, password="")  # else it would ask for one
        flags = f"--tls-ca {ca}"
        if ca is not None:
            context.load_verify_locations(ca)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"{key_flag} {key}: not the key of the certificate {cert}") from None
        raise UsageError(f"{flags}: {error.reason or error}") from None
