"""Access control: TLS, mutual TLS, bearer tokens, and no public port by accident."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from gpt_dist.errors import GptDistError, UsageError, describe
from serve.certificates import check_files
from serve.engine.callers import Terms
from serve.options import Options
from serve.tokens import parse_tokens

log = logging.getLogger("serve")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Access:
    """How a port is protected, and which exceptions its operator allows."""

    tls: bool = False
    tokens: bool = False
    client_certificates: bool = False
    allow_anonymous: bool = False
    allow_insecure: bool = False

    @classmethod
    def of(cls, options: Options) -> Access:
        """The access that a server's options give."""
        return cls(
            tls=options.tls_cert is not None,
            tokens=options.auth_token_file is not None,
            client_certificates=options.tls_ca is not None,
            allow_anonymous=options.allow_anonymous,
            allow_insecure=options.allow_insecure,
        )

    def guards(self, host: str) -> bool:
        """Whether the metrics port requires the TLS and credentials of the gRPC port.

        It is open on loopback and on trusted networks.
        """
        return not is_loopback(host) and not self.allow_insecure


def check_exposure(
    flag: str,
    host: str,
    access: Access,
    encryption: str = "--tls-cert and --tls-key",
    authentication: str = "--auth-token-file or --tls-ca",
) -> None:
    """Refuse to expose a port by accident. The rule for every port of every command.

    A port that other machines can reach needs TLS and authentication, unless the operator allows
    anonymous callers or trusts the network.

    Args:
        flag: the option that names the host.
        host: its value.
        access: what protects the port.
        encryption: the options that give TLS.
        authentication: the options that authenticate callers.

    Raises:
        UsageError: the port would be exposed.
    """
    if is_loopback(host) or access.allow_insecure:
        return
    where = f"{flag} {host} listens beyond this machine"
    if not access.tls:
        raise UsageError(
            f"{where}: give {encryption}, or --allow-insecure if the network is trusted"
        )
    if not (access.tokens or access.client_certificates or access.allow_anonymous):
        raise UsageError(
            f"{where}: give {authentication}, or --allow-anonymous to answer everybody"
        )


def check_ports(options: Options) -> None:
    """Check all ports of a server.

    Raises:
        UsageError: a port would be exposed.
    """
    access = Access.of(options)
    check_exposure("--host", options.host, access)
    if options.metrics_port is not None:
        check_exposure("--metrics-host", options.metrics_host, access)


class Reloader:
    """Checks files for changes in its own thread, so that a hanging file system blocks no call.

    Args:
        interval: seconds between two looks.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self._interval = interval
        self._files: list[Certificates | TokenFile] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="files", daemon=True)

    def add(self, files: Certificates | TokenFile) -> None:
        """Check these files too."""
        self._files.append(files)
        if not self._thread.is_alive():
            self._thread.start()

    def close(self) -> None:
        """Stop the thread without waiting for it: the file system may hang."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            for files in self._files:
                files.look()


class _Files:
    """Files that are loaded again when they change. If that fails, the old content stays."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._stamp = self._stamps()
        self._reason = ""
        """Why the files could not be used at the last look."""

    def _stamps(self) -> list[tuple[int, int, int]]:
        stats = [path.stat() for path in self.paths]
        return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]

    def _use(self) -> None:
        """Read the files.

        Raises:
            GptDistError: their content cannot be used.
            OSError: a file cannot be read.
        """
        raise NotImplementedError

    def look(self) -> None:
        """Load the files if they have changed. A failure is logged once and retried."""
        try:
            stamp = self._stamps()
            if stamp == self._stamp:
                return
            self._use()
            self._stamp, self._reason = stamp, ""
            log.info("%s: changed and read again", self.paths[0])
        except Exception as error:  # it may be half written
            reason = describe(error)
            if reason != self._reason:
                log.warning("keeping the old content of %s: %s", self.paths[0], reason)
            self._reason = reason


class Certificates(_Files):
    """The server's TLS files. Changed files are used for handshakes after the next `look`.

    Args:
        cert: certificate chain (PEM).
        key: its private key (PEM).
        ca: authorities that must have signed client certificates (PEM); None requires no client
            certificates.

    Raises:
        GptDistError: a file cannot be read, or certificate and key do not match.
    """

    def __init__(self, cert: Path, key: Path, ca: Path | None = None) -> None:
        self.cert, self.key, self.ca = cert, key, ca
        try:
            super().__init__([cert, key] if ca is None else [cert, key, ca])
            self._use()
        except OSError as error:
            raise GptDistError(f"TLS file: {describe(error)}") from None
        self._given = self._configuration

    def _use(self) -> None:
        # Use exactly the bytes that were checked: another process may replace a file in between.
        before = [path.read_bytes() for path in self.paths]
        check_files(self.cert, self.key, self.ca)
        try:
            context = self._load()
            changed = before != [path.read_bytes() for path in self.paths]
        except ssl.SSLError:
            changed = True
        if changed:
            raise GptDistError(f"{self.cert}: it or its key changed while it was read")
        cert, key, *ca = before
        self._context = context
        self._configuration = grpc.ssl_server_certificate_configuration(
            [(key, cert)], ca[0] if ca else None
        )

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.cert, self.key, password="")
        if self.ca is not None:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def context(self) -> ssl.SSLContext:
        """A context for ports that gRPC does not serve. Handshakes use the newest files."""
        context = self._load()

        def renew(connection: ssl.SSLObject, *_: object) -> None:
            # A new context, because an old one keeps the authorities that it once had.
            connection.context = self._context

        context.sni_callback = renew
        return context

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by grpc before each handshake; None is no change."""
        newest = self._configuration
        if newest is self._given:
            return None
        self._given = newest
        return newest

    def credentials(self) -> grpc.ServerCredentials:
        """The argument for ``add_secure_port``."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._renewed,  # type: ignore[arg-type]
            require_client_authentication=self.ca is not None,
        )


class TokenFile(_Files):
    """Bearer tokens, one per line, with what their callers may use.

    Args:
        path: the file; `serve.tokens.parse_tokens` describes its lines.
        flag: the option that names it.

    Raises:
        GptDistError: the file cannot be read, contains no token, or has a line that is not valid.
    """

    def __init__(self, path: Path, flag: str = "--auth-token-file") -> None:
        self.path, self._flag = path, flag
        self._tokens: list[tuple[bytes, Terms]] = []
        try:
            super().__init__([path])
            self._use()
        except OSError as error:
            raise GptDistError(f"{flag}: {describe(error)}") from None
        if not self._tokens:
            raise GptDistError(f"{flag} {path}: contains no token")

    def _use(self) -> None:
        self._tokens = parse_tokens(self.path.read_bytes(), f"{self._flag} {self.path}")

    def find(self, authorization: str) -> Terms | None:
        """What the caller with this ``authorization`` header may use; None if it may not call."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        given = token.strip().encode()
        # Compare with every token in constant time, so that the duration reveals nothing.
        found = None
        for known, terms in self._tokens:
            if hmac.compare_digest(given, known):
                found = terms
        return found

    def accepts(self, authorization: str) -> bool:
        """Whether an ``authorization`` header carries one of the tokens."""
        return self.find(authorization) is not None
