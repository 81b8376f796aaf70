"""TLS, mutual TLS, tokens and the refusal of public ports, with generated certificates."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gpt_dist.errors import GptDistError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.certificates import check_files
from serve.client import Client, connection
from serve.security import Certificates, TokenFile
from tests.serve.conftest import PATIENCE, LiveServer, StartServer, wait_until


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
        client._model_stub.GetModelInfo(
            _info(), timeout=PATIENCE, metadata=client.metadata, wait_for_ready=False
        )
    except grpc.RpcError as error:
        return str(error.code().name)
    finally:
        client.close()
    return "OK"


def look(server: LiveServer) -> None:
    """Read changed files now; the server's thread would do so within a second."""
    for files in server.server._files._files:
        files.look()


def _info() -> Any:
    from gpt_dist.v1 import model_service_pb2 as model_api

    return model_api.GetModelInfoRequest()


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
    look(server)
    assert code(Client(server.target, tls_ca=old)) == "OK"
    second = Authority(tmp_path / "files", "second")
    second.issue("server")
    look(server)
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
    wait_until(lambda: status("gamma") == "OK")  # by the thread
    assert [status("alpha"), status("gamma")] == ["UNAUTHENTICATED", "OK"]
    path.write_text("gamma\ndelta\n")
    look(server)
    assert [status("delta"), status("gamma")] == ["OK", "OK"]
    path.unlink()
    look(server)
    assert status("gamma") == "OK"
    path.write_text("")
    look(server)
    assert status("gamma") == "UNAUTHENTICATED"


def test_a_file_system_that_hangs_holds_up_nobody(
    start: StartServer, decoder: Decoder, tmp_path: Path
) -> None:
    """A pipe that nobody writes to stands for the file: opening it never returns."""
    path = tmp_path / "tokens"
    path.write_text("alpha\n")
    server = start(decoder, auth_token_file=path)
    path.unlink()
    os.mkfifo(path)
    reading = threading.Thread(target=look, args=(server,), daemon=True)
    reading.start()
    assert code(Client(server.target, token="alpha")) == "OK"
    assert code(Client(server.target, token="guess")) == "UNAUTHENTICATED"
    assert reading.is_alive()
    with path.open("w") as pipe:  # let it go
        pipe.write("beta\n")
    reading.join(PATIENCE)


def test_certificates_are_used_as_they_were_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process replaces the key between the check and the reading."""
    cert, key = Authority(tmp_path, "first").issue("server")
    files = Certificates(cert, key)
    used = files._configuration
    good = [path.read_bytes() for path in (cert, key)]

    def check(*paths: Any) -> None:
        check_files(*paths)
        key.write_text("half written")

    Authority(tmp_path, "second").issue("server")
    with monkeypatch.context() as patch:
        patch.setattr("serve.security.check_files", check)
        for _ in range(3):
            Authority(tmp_path, "third").issue("server")
            files.look()
            assert files._renewed() is None
    assert files._configuration is used
    lines = [record for record in caplog.records if "keeping the old" in record.getMessage()]
    assert len(lines) == 1  # not one each second
    for path, content in zip((cert, key), good, strict=True):
        path.write_bytes(content)
    files.look()
    renewed = files._renewed()
    assert renewed is files._configuration is not used
    assert files._renewed() is None


def test_unusable_token_files(tmp_path: Path) -> None:
    with pytest.raises(GptDistError, match=r"No such file.*nowhere"):
        TokenFile(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(GptDistError, match="contains no token"):
        TokenFile(tmp_path / "empty")


def scrape(
    server: LiveServer,
    scheme: str,
    token: str = "",
    ca: Path | None = None,
    context: ssl.SSLContext | None = None,
) -> str:
    """Read the metrics; returns the beginning of the answer, or the error."""
    request = urllib.request.Request(f"{scheme}://127.0.0.1:{server.server.metrics_port}/metrics")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    if ca:
        context = ssl.create_default_context(cafile=ca)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE, context=context) as answer:
            return str(answer.read(6).decode())
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError:
        return "no answer"


def test_metrics_are_guarded_like_calls(
    start: StartServer, decoder: Decoder, tmp_path: Path
) -> None:
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("server")
    tokens = tmp_path / "tokens"
    tokens.write_text("alpha\n")
    server = start(
        decoder, tls_cert=cert, tls_key=key, auth_token_file=tokens,
        metrics_host="0.0.0.0", metrics_port=0,
    )  # fmt: skip
    assert scrape(server, "http") == "no answer"
    assert scrape(server, "https", "alpha", authority.path) == "# HELP"
    assert scrape(server, "https", "guess", authority.path) == "401"
    assert scrape(server, "https", "", authority.path) == "401"
    assert scrape(server, "https", "alpha") == "no answer"  # the certificate is not trusted
    assert server.server.metrics.rejections.labels("unauthenticated")._value.get() == 2
    local = start(decoder, tls_cert=cert, tls_key=key, auth_token_file=tokens, metrics_port=0)
    assert scrape(local, "http") == "# HELP"
    second = Authority(tmp_path / "second", "second")
    for ours, theirs in zip((cert, key), second.issue("server"), strict=True):
        ours.write_bytes(theirs.read_bytes())
    look(server)
    assert scrape(server, "https", "alpha", second.path) == "# HELP"


def test_an_authority_that_is_replaced_is_trusted_no_more(
    start: StartServer, decoder: Decoder, tmp_path: Path
) -> None:
    """Neither for calls nor for metrics."""
    ours, first, second = (Authority(tmp_path / name, name) for name in ("ours", "one", "two"))
    cert, key = ours.issue("server")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(first.path.read_bytes())
    server = start(
        decoder, tls_cert=cert, tls_key=key, tls_ca=trusted, metrics_host="0.0.0.0", metrics_port=0
    )
    clients = {"one": first.issue("client"), "two": second.issue("client")}

    def accepted() -> dict[str, tuple[str, str]]:
        found = {}
        for name, (mine, secret) in clients.items():
            call = code(Client(server.target, tls_ca=ours.path, tls_cert=mine, tls_key=secret))
            context = ssl.create_default_context(cafile=ours.path)
            context.load_cert_chain(mine, secret)
            found[name] = (call, scrape(server, "https", context=context))
        return found

    yes, no = ("OK", "# HELP"), ("UNAVAILABLE", "no answer")
    assert accepted() == {"one": yes, "two": no}
    trusted.write_bytes(second.path.read_bytes())
    look(server)
    assert accepted() == {"one": no, "two": yes}


def test_a_scraper_that_says_nothing_is_in_nobodys_way(
    start: StartServer, decoder: Decoder, tmp_path: Path
) -> None:
    """It does not even shake hands."""
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("server")
    server = start(
        decoder, tls_cert=cert, tls_key=key, allow_anonymous=True,
        metrics_host="0.0.0.0", metrics_port=0,
    )  # fmt: skip
    address = ("127.0.0.1", server.server.metrics_port or 0)
    with socket.create_connection(address), socket.create_connection(address):
        assert scrape(server, "https", ca=authority.path) == "# HELP"


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
