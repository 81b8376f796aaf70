"""Access control: TLS, mutual TLS, bearer tokens, and no public port by accident."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from pathlib import Path

import grpc

from gpt_dist.errors import GptDistError, UsageError, describe
from serve.certificates import check_files

log = logging.getLogger("serve")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, tls: bool, allow_insecure: bool) -> None:
    """Refuse to listen beyond this machine without TLS.

    Raises:
        UsageError: there is neither TLS nor ``allow_insecure``.
    """
    if not (tls or allow_insecure or is_loopback(host)):
        raise UsageError(
            f"--host {host} listens beyond this machine: give --tls-cert and --tls-key, "
            "or --allow-insecure if the network is trusted"
        )


class Certificates:
    """The server's TLS files. Changed files are used from the next handshake on.

    Args:
        cert: certificate chain (PEM).
        key: its private key (PEM).
        ca: authorities that must have signed client certificates (PEM); None requires no client
            certificates.

    Raises:
        GptDistError: a file cannot be read, or certificate and key do not match.
    """

    def __init__(self, cert: Path, key: Path, ca: Path | None = None) -> None:
        self.paths = [path for path in (key, cert, ca) if path is not None]
        self.ca = ca
        self._check()
        self._stamp = self._stamps()

    def _stamps(self) -> list[tuple[int, int]]:
        return [(stat.st_mtime_ns, stat.st_size) for stat in (path.stat() for path in self.paths)]

    def _check(self) -> None:
        key, cert = self.paths[:2]
        try:
            check_files(cert, key, self.ca)
        except OSError as error:
            raise GptDistError(f"TLS file: {describe(error)}") from None

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        key, cert, *ca = (path.read_bytes() for path in self.paths)
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca[0] if ca else None)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by grpc before each handshake."""
        try:
            stamp = self._stamps()
            if stamp == self._stamp:
                return None
            self._check()
            self._stamp = stamp
            log.info("TLS files changed; using the new ones")
            return self._configuration()
        except (GptDistError, OSError) as error:  # it may be half written
            log.warning("keeping the old TLS files: %s", describe(error))
            return None

    def credentials(self) -> grpc.ServerCredentials:
        """The argument for ``add_secure_port``."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._renewed,  # type: ignore[arg-type]  # None is no change
            require_client_authentication=self.ca is not None,
        )


class TokenFile:
    """Bearer tokens, one per line. Blank lines and comments (``#``) are skipped.

    The file is read again when it changes.

    Raises:
        GptDistError: the file cannot be read or contains no token.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._tokens: list[bytes] = []
        try:
            self._read()
        except OSError as error:
            raise GptDistError(f"--auth-token-file: {describe(error)}") from None
        if not self._tokens:
            raise GptDistError(f"--auth-token-file {path}: contains no token")

    def _read(self) -> None:
        stat = self.path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamp != self._stamp:
            lines = (line.strip() for line in self.path.read_bytes().splitlines())
            self._tokens = [line for line in lines if line and not line.startswith(b"#")]
            self._stamp = stamp

    def accepts(self, authorization: str) -> bool:
        """Whether an ``authorization`` header carries one of the tokens."""
        try:
            self._read()
        except OSError as error:
            log.warning("keeping the old tokens: %s", describe(error))
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return False
        given = token.strip().encode()
        # Compare with every token in constant time, so that the duration reveals nothing.
        return sum(hmac.compare_digest(given, known) for known in self._tokens) > 0
