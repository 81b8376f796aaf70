"""TLS, mutual TLS, tokens and the refusal of public ports, with generated certificates."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.client import Client, connection
from serve.security import Certificates, TokenFile, check_exposure, is_loopback
from tests.serve.conftest import PATIENCE, LiveServer, StartServer


class Authority:
    """A certificate authority."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.key = directory, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.serial = 0
        self.path = self._write("ca.pem", self._sign(self.name, self.key, authority=True))

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, authority: bool) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def _write(self, name: str, certificate: Any) -> Path:
        path = self.directory / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path

    def issue(self, name: str) -> tuple[Path, Path]:
        """Write a certificate and its key, over existing ones; returns their paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.serial += 1
        cert = self._write(f"{name}.pem", self._sign(subject, key, authority=False))
        key_path = self.directory / f"{name}.key"
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert, key_path


def code(client: Client) -> str:
    """Make one call; returns the name of its status."""
    try:
        client._stub.GetModelInfo(
            _info(), timeout=PATIENCE, metadata=client.metadata, wait_for_ready=False
        )
    except grpc.RpcError as error:
        return str(error.code().name)
    finally:
        client.close()
    return "OK"


def _info() -> Any:
    from gpt_dist.v1 import generation_service_pb2 as api

    return api.GetModelInfoRequest()


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CHANNEL_OPTIONS", [("grpc.enable_retries", 0)])


@pytest.fixture(scope="module")
def decoder(model: GPT) -> Decoder:
    return Decoder(model, max_slots=1, dtype="fp32")


def test_tls(start: StartServer, decoder: Decoder, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    cert, key = ours.issue("server")
    server = start(decoder, tls_cert=cert, tls_key=key)
    assert code(Client(server.target, tls_ca=ours.path)) == "OK"
    assert code(Client(server.target, tls_ca=theirs.path)) == "UNAVAILABLE"
    assert code(Client(server.target)) == "UNAVAILABLE"


def test_mutual_tls(start: StartServer, decoder: Decoder, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    cert, key = ours.issue("server")
    server = start(decoder, tls_cert=cert, tls_key=key, tls_ca=ours.path)
    for authority, expected in ((ours, True), (theirs, False)):
        client_cert, client_key = authority.issue("client")
        client = Client(server.target, tls_ca=ours.path, tls_cert=client_cert, tls_key=client_key)
        assert (code(client) == "OK") == expected
    assert code(Client(server.target, tls_ca=ours.path)) != "OK"


def test_renewed_certificates_are_used(
    start: StartServer, decoder: Decoder, tmp_path: Path
) -> None:
    first = Authority(tmp_path / "files", "first")
    cert, key = first.issue("server")
    server = start(decoder, tls_cert=cert, tls_key=key)
    old = tmp_path / "old.pem"
    old.write_bytes(first.path.read_bytes())
    assert code(Client(server.target, tls_ca=old)) == "OK"
    key.write_text("half written")
    assert code(Client(server.target, tls_ca=old)) == "OK"
    second = Authority(tmp_path / "files", "second")
    second.issue("server")
    assert code(Client(server.target, tls_ca=second.path)) == "OK"
    assert code(Client(server.target, tls_ca=old)) != "OK"


def test_unusable_tls_files(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "a")
    cert, key = authority.issue("one")
    _, other = authority.issue("two")
    with pytest.raises(GptDistError, match=r"one\.pem"):
        Certificates(cert, other)
    with pytest.raises(GptDistError, match=r"No such file.*nowhere"):
        Certificates(tmp_path / "nowhere", key)
    with pytest.raises(GptDistError, match=r"one\.key"):
        Certificates(cert, key, ca=key)


def test_tokens(start: StartServer, decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# two of them\nalpha\n\nbeta\n")
    server: LiveServer = start(decoder, auth_token_file=path)

    def status(token: str | None) -> str:
        return code(Client(server.target, token=token))

    assert [status(token) for token in ("alpha", "beta")] == ["OK", "OK"]
    for wrong in (None, "", "alph", "alphaa", "# two of them", "Alpha"):
        assert status(wrong) == "UNAUTHENTICATED"
    assert code(Client(server.target, token_file=path)) == "OK"  # sends the first one
    client = Client(server.target)
    client.metadata = [("authorization", "alpha")]  # no scheme
    assert code(client) == "UNAUTHENTICATED"
    with Client(server.target) as probe:
        assert probe.health()  # probes send no token
        with pytest.raises(grpc.RpcError) as caught:
            list(probe.stream([1]))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    # Tokens are rotated by replacing the file or by writing to it.
    new = tmp_path / "new"
    new.write_text("gamma\n")
    new.rename(path)
    assert [status("alpha"), status("gamma")] == ["UNAUTHENTICATED", "OK"]
    path.write_text("gamma\ndelta\n")
    assert [status("delta"), status("gamma")] == ["OK", "OK"]
    path.unlink()
    assert status("gamma") == "OK"
    path.write_text("")
    assert status("gamma") == "UNAUTHENTICATED"


def test_unusable_token_files(tmp_path: Path) -> None:
    with pytest.raises(GptDistError, match=r"No such file.*nowhere"):
        TokenFile(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(GptDistError, match="contains no token"):
        TokenFile(tmp_path / "empty")


def test_open_ports_are_refused_unless_allowed() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        check_exposure(host, tls=False, allow_insecure=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UsageError, match="--allow-insecure"):
            check_exposure(host, tls=False, allow_insecure=False)
        check_exposure(host, tls=True, allow_insecure=False)
        check_exposure(host, tls=False, allow_insecure=True)


def test_listening_everywhere_if_allowed(start: StartServer, decoder: Decoder) -> None:
    server = start(decoder, host="0.0.0.0", allow_insecure=True)
    assert code(Client(server.target)) == "OK"


def test_no_token_is_logged(
    start: StartServer, decoder: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    path = tmp_path / "tokens"
    path.write_text("s3cret-value\n")
    server = start(decoder, auth_token_file=path)
    assert code(Client(server.target, token="s3cret-value")) == "OK"
    assert code(Client(server.target, token="s3cret-guess")) == "UNAUTHENTICATED"
    text = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "s3cret" not in text
    assert os.environ.get("GPT_DIST_TOKEN") is None
