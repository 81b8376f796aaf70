"""One rule decides which hosts a port may listen on."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt_dist.errors import UsageError
from serve.options import Options
from serve.security import Access, check_exposure, check_ports, is_loopback

LOCAL = ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")
OPEN = ("0.0.0.0", "::", "192.168.1.5", "example.org", "")
EXPOSURE = [
    # TLS, tokens, CA, anonymous, insecure → what is missing
    ((0, 0, 0, 0, 0), "--tls-cert"),
    ((0, 1, 0, 0, 0), "--tls-cert"),
    ((0, 0, 0, 1, 0), "--tls-cert"),
    ((0, 1, 0, 1, 0), "--tls-cert"),
    ((1, 0, 0, 0, 0), "--auth-token-file or --tls-ca"),
    ((1, 1, 0, 0, 0), None),
    ((1, 0, 1, 0, 0), None),
    ((1, 1, 1, 0, 0), None),
    ((1, 0, 0, 1, 0), None),
    ((0, 0, 0, 0, 1), None),
    ((0, 1, 0, 0, 1), None),
    ((1, 0, 0, 0, 1), None),
]


@pytest.mark.parametrize("port", ["--host", "--metrics-host"])
@pytest.mark.parametrize(("given", "missing"), EXPOSURE)
def test_exposure(tmp_path: Path, port: str, given: tuple[int, ...], missing: str | None) -> None:
    """Host × TLS × tokens × authorities × flags × port."""
    tls, tokens, ca, anonymous, insecure = map(bool, given)
    file = tmp_path / "file"

    def check(host: str) -> None:
        hosts = {"host": "127.0.0.1", "metrics_host": "127.0.0.1"}
        hosts[port[2:].replace("-", "_")] = host
        check_ports(
            Options(
                tmp_path,
                metrics_port=0,
                tls_cert=file if tls else None,
                tls_key=file if tls else None,
                tls_ca=file if ca else None,
                auth_token_file=file if tokens else None,
                allow_anonymous=anonymous,
                allow_insecure=insecure,
                **hosts,  # type: ignore[arg-type]
            )
        )

    for host in LOCAL:
        assert is_loopback(host)
        check(host)
    for host in OPEN:
        assert not is_loopback(host)
        if missing is None:
            check(host)
        else:
            with pytest.raises(UsageError, match=f"{port} {host} listens.*{missing}"):
                check(host)


def test_metrics_that_are_off_need_nothing() -> None:
    check_ports(Options(Path("x"), metrics_host="0.0.0.0"))
    with pytest.raises(UsageError, match="--page-cert"):
        check_exposure("--host", "0.0.0.0", Access(), "--page-cert and --page-key")
