"""A web page for a model: a prompt, sampling settings, and streaming replies side by side.

    python -m serve.playground --target 127.0.0.1:50051
    python -m serve.playground --checkpoint runs/mine

With ``--checkpoint``, a server runs in this process, on a loopback port. A page that other machines
can reach asks visitors for a token of ``--page-token-file``; it never lends its own.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_dist.errors import GptDistError, Parser, UsageError, at_least, run_main
from serve.certificates import check_files
from serve.client.connection import DEFAULT_TARGET, read_token
from serve.playground.page import build, model_card, model_info
from serve.playground.replies import CSS
from serve.security import Access, TokenFile, check_exposure, is_loopback

if TYPE_CHECKING:
    from serve.server import Server

CONNECTION = ("token_file", "tls", "tls_ca", "tls_cert", "tls_key")
"""Flags that are arguments of the clients."""


class InProcessServer:
    """A server in a thread of this process, on a free loopback port.

    Args:
        checkpoint: run, checkpoint or exported model.

    Raises:
        UsageError: there is no checkpoint.
        GptDistError: the checkpoint is damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        from serve.options import Options
        from serve.server import Server

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="server")
        self._thread.start()

        async def start() -> Server:
            name = str(checkpoint)
            server = Server(Options(checkpoint=checkpoint, model_name=name, port=0, grace=2.0))
            try:
                await server.start()
                await server.load()
            except BaseException:
                await server.drain()
                raise
            return server

        self._server = self._run(start())
        self.target = f"127.0.0.1:{self._server.port}"

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """Drain for at most two seconds, and stop."""
        self._run(self._server.drain())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m serve.playground",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A web page for trying out a model.",
        epilog="examples:\n"
        "  python -m serve.playground --target 127.0.0.1:50051\n"
        "  python -m serve.playground --checkpoint runs/mine --port 7861\n"
        "  python -m serve.playground --target gpu:50051 --tls-ca ca.pem --token-file token \\\n"
        "      --host 0.0.0.0 --page-cert c.pem --page-key k.pem --page-token-file tokens.txt",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--target", metavar="HOST:PORT", help=f"server to use (default: {DEFAULT_TARGET})"
    )
    source.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="serve this model in this process instead"
    )
    connection = parser.add_argument_group("connection to the server, as in serve.client")
    connection.add_argument("--tls", action="store_true", help="encrypt")
    for name, text in (
        ("token-file", "file with the bearer token (else GPT_DIST_TOKEN)"),
        ("tls-ca", "certificate authorities to trust (PEM)"),
        ("tls-cert", "certificate of this client (PEM)"),
        ("tls-key", "its private key (PEM)"),
    ):
        connection.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    page = parser.add_argument_group("page")
    page.add_argument(
        "--host", default="127.0.0.1", help="address of the page (default: 127.0.0.1)"
    )
    page.add_argument(
        "--port",
        type=at_least(1, int, 65535),
        default=7860,
        help="port of the page (default: 7860)",
    )
    for name, text in (
        ("page-cert", "certificate chain of the page (PEM)"),
        ("page-key", "its private key (PEM)"),
        ("page-token-file", "visitors log in with one of these tokens, one per line"),
    ):
        page.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    page.add_argument(
        "--allow-anonymous", action="store_true", help="allow anonymous visitors (requires TLS)"
    )
    page.add_argument("--allow-insecure", action="store_true", help="trust the network: any --host")
    return parser


def check_page(args: argparse.Namespace) -> None:
    """Refuse to expose the page by accident, or to lend its credential to unknown visitors.

    Raises:
        UsageError: the page needs TLS or a login.
    """
    access = Access(
        tls=args.page_cert is not None,
        tokens=args.page_token_file is not None,
        allow_anonymous=args.allow_anonymous,
        allow_insecure=args.allow_insecure,
    )
    check_exposure(
        "--host", args.host, access, "--page-cert and --page-key", "--page-token-file"
    )  # fmt: skip
    lends = read_token(args.token_file) is not None or args.tls_cert is not None
    if lends and not args.checkpoint and not access.tokens and not is_loopback(args.host):
        raise UsageError(
            f"--host {args.host}: the page would lend its own token or certificate to every "
            "visitor; give --page-token-file"
        )
    check_files(args.page_cert, args.page_key, None, "--page-cert", "--page-key")


def launch_options(args: argparse.Namespace) -> dict[str, Any]:
    """Gradio's options for the page's TLS and login.

    Raises:
        GptDistError: the file of tokens cannot be used.
    """
    options: dict[str, Any] = {}
    if args.page_cert:
        options |= {"ssl_certfile": str(args.page_cert), "ssl_keyfile": str(args.page_key)}
        options["ssl_verify"] = False  # Gradio checks its own page at the start
    if args.page_token_file:
        tokens = TokenFile(args.page_token_file, "--page-token-file")
        options["auth"] = lambda name, token: tokens.accepts(f"Bearer {token}")
        options["auth_message"] = "Any name, and a token as the password."
    return options


def main(argv: list[str] | None = None) -> None:
    """Serve the page until interrupted.

    Raises:
        UsageError: Gradio is not installed, there is no checkpoint, or strangers could use the
            page.
        GptDistError: no server answers, the checkpoint is damaged, or the port is in use.
    """
    args = make_parser().parse_args(argv)
    check_page(args)
    options = launch_options(args)
    # Gradio takes seconds to import: what can go wrong without it goes wrong first.
    if find_spec("gradio") is None:
        raise UsageError("the playground needs Gradio: pip install 'gpt_dist[playground]'")
    taken = GptDistError(
        f"cannot listen on {args.host}:{args.port}: the port is in use, or the address is not this "
        "machine's; choose another --port"
    )
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except OSError:
        raise taken from None
    server = InProcessServer(args.checkpoint) if args.checkpoint else None
    if server is not None:
        connection: dict[str, Any] = {"target": server.target}
    else:
        connection = {name: getattr(args, name) for name in CONNECTION}
        connection["target"] = args.target or DEFAULT_TARGET
    try:
        info, slots = model_info(connection)
        page = build(connection, info, slots, model_card(info, args.checkpoint))
        try:
            page.launch(
                server_name=args.host, server_port=args.port, css=CSS, quiet=True,
                prevent_thread_lock=True,
                _frontend=False,  # do not end where the page takes more than 3 s to answer
                **options,
            )  # fmt: skip
        except OSError:
            raise taken from None
        scheme = "https" if args.page_cert else "http"
        print(f"ready: {scheme}://{args.host}:{args.port}", flush=True)
        page.block_thread()
    finally:
        if server is not None:
            server.close()


if __name__ == "__main__":
    run_main(main)
