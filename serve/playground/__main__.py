"""A web page for a model: a prompt, sampling settings, and streaming replies side by side.

    python -m serve.playground --target 127.0.0.1:50051
    python -m serve.playground --checkpoint runs/mine

With ``--checkpoint``, a server runs in this process, on a loopback port.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_dist.errors import GptDistError, Parser, UsageError, run_main
from serve.client.connection import DEFAULT_TARGET
from serve.playground.page import build, model_card, model_info
from serve.playground.replies import CSS

if TYPE_CHECKING:
    from serve.server import Server


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
        "  python -m serve.playground --checkpoint runs/mine --port 7861",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--target", metavar="HOST:PORT", help=f"server to use (default: {DEFAULT_TARGET})"
    )
    source.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="serve this model in this process instead"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of the page (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Serve the page until interrupted.

    Raises:
        UsageError: Gradio is not installed, or there is no checkpoint.
        GptDistError: no server answers, the checkpoint is damaged, or the port is in use.
    """
    args = make_parser().parse_args(argv)
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UsageError(
            "the playground needs Gradio: pip install 'gpt_dist[playground]'"
        ) from None
    server = InProcessServer(args.checkpoint) if args.checkpoint else None
    target = server.target if server else args.target or DEFAULT_TARGET
    try:
        info, slots = model_info(target)
        page = build(target, info, slots, model_card(info, args.checkpoint))
        try:
            page.launch(
                server_name=args.host, server_port=args.port, css=CSS, quiet=True,
                prevent_thread_lock=True,
            )  # fmt: skip
        except (OSError, OverflowError):
            raise GptDistError(
                f"cannot listen on {args.host}:{args.port}: the port is in use, or the address is "
                "not this machine's; choose another --port"
            ) from None
        print(f"ready: http://{args.host}:{args.port}", flush=True)
        page.block_thread()
    finally:
        if server is not None:
            server.close()


if __name__ == "__main__":
    run_main(main)
