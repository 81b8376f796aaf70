"""A web page for a model: a prompt, sampling settings, and streaming replies side by side.

    python -m serve.playground --target 127.0.0.1:50051
    python -m serve.playground --checkpoint runs/mine

With ``--checkpoint``, a server runs in this process, on a loopback port.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import html
import math
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from gpt_dist.errors import GptDistError, Parser, UsageError, run_main
from serve.client import AsyncClient, Client
from serve.client.connection import DEFAULT_TARGET
from serve.client.words import failure

if TYPE_CHECKING:
    import gradio

    from serve.server import Server

MAX_SAMPLES = 8
TOP = 5
"""Number of alternatives shown on hover."""
REFRESH_SECONDS = 0.05
"""Minimum time between two updates of the page."""
BYTES_PER_SECOND = 1e6
"""Each update sends the whole text, so longer replies are updated less often."""

CSS = """
.replies { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
.reply { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .8rem; }
.reply pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-family: inherit; }
.reply b { font-weight: normal; opacity: .55; }
.reply i { font-style: normal; position: relative; }
.reply i:hover { outline: 1px solid currentColor; cursor: help; }
.reply i:hover::after {
  content: attr(data-hint); position: absolute; left: 0; top: 1.6em; z-index: 9; white-space: pre;
  padding: .5rem .7rem; border-radius: 6px; font: .8rem/1.5 monospace;
  color: #eee; background: #222e;
}
.reply footer { margin-top: .6rem; font-size: .8em; opacity: .7; }
""" + "".join(
    # From red (unlikely) to green (likely), in tenths.
    f".reply i.p{tenth} {{ background: hsl({13 * tenth} 70% 50% / .22); }}\n"
    for tenth in range(10)
)


class Piece(NamedTuple):
    """Text of one token, or of several tokens that form one character together."""

    text: str
    probability: float
    hint: str


class Reply:
    """One continuation as it grows."""

    def __init__(self) -> None:
        self.text = ""
        self.pieces: list[Piece] = []
        self.tokens = 0
        self.end = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting: list[Any] = []

    def add(self, message: Any) -> None:
        """Add a message of the stream."""
        self.text += message.text_delta
        self.tokens += len(message.token_ids)
        for entry in message.logprobs:
            self._waiting.append(entry)
            text = self._decoder.decode(entry.token)
            if text:
                logprob = sum(part.logprob for part in self._waiting)
                self.pieces.append(Piece(text, math.exp(logprob), hint(entry)))
                self._waiting = []
        if message.HasField("finished"):
            names = type(message.finished).DESCRIPTOR.fields_by_name["finish_reason"].enum_type
            name = names.values_by_number[message.finished.finish_reason].name
            self.end = name.removeprefix("FINISH_REASON_").lower().replace("_", " ")

    def html(self, prompt: str) -> str:
        """The reply as a panel. Colour and hover text show each token's probability."""
        spans, left = [], len(self.text)
        for piece in self.pieces:
            shown = piece.text[:left]
            left -= len(shown)
            if not shown:  # the server holds it back: it may begin a stop sequence
                break
            tenth, told = int(9.99 * piece.probability), html.escape(piece.hint)
            spans.append(f'<i class="p{tenth}" data-hint="{told}">{html.escape(shown)}</i>')
        state = self.end or "…"
        return (
            f'<div class="reply"><pre><b>{html.escape(prompt)}</b>'
            f"{''.join(spans)}</pre><footer>{self.tokens} tokens · {state}</footer></div>"
        )


def hint(entry: Any) -> str:
    """Hover text of a token: its probability, and the most likely tokens at its place."""
    lines = [f"{quote(entry.token)}  {math.exp(entry.logprob):.1%}", ""]
    lines += [f"{math.exp(top.logprob):6.1%}  {quote(top.token)}" for top in entry.top]
    return "\n".join(lines)


def quote(token: bytes) -> str:
    """A token's text with visible white space."""
    return repr(token.decode("utf-8", errors="replace"))


# --- talking to the server ----------------------------------------------------------------------


async def converse(
    target: str,
    prompt: str,
    samples: float,
    max_new_tokens: float,
    temperature: float,
    top_k: float,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: float,
    stop: str,
) -> AsyncGenerator[tuple[str, str], None]:
    """Stream replies. Closing the generator cancels the call and frees the server's slots.

    Yields:
        (panels as HTML, status line).
    """
    replies = [Reply() for _ in range(int(samples))]
    status = "waiting"

    def page() -> str:
        panels = "".join(reply.html(prompt) for reply in replies)
        return f'<div class="replies">{panels}</div>'

    yield page(), status
    due = 0.0
    try:
        async with AsyncClient(target) as client:
            stream = client.stream(
                prompt,
                timeout=3600,
                n=len(replies),
                max_new_tokens=int(max_new_tokens),
                temperature=temperature,
                top_k=int(top_k),
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=int(seed) if seed >= 0 else None,
                stop_sequences=[stop] if stop else None,
                logprobs=True,
                top_logprobs=TOP,
            )
            async for message in stream:
                if message.HasField("started"):
                    status = f"seed {message.started.seed}"
                replies[message.index].add(message)
                if time.monotonic() > due:
                    content = page()
                    yield content, status
                    due = time.monotonic() + REFRESH_SECONDS + len(content) / BYTES_PER_SECOND
        yield page(), status
    except grpc.RpcError as error:
        yield page(), f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]


def model_card(target: str, checkpoint: Path | None) -> str:
    """Describe the served model in Markdown, after an exported model's own README.md.

    Raises:
        GptDistError: the server does not answer.
    """
    try:
        with Client(target, timeout=10) as client:
            info = client.info()
    except grpc.RpcError as error:
        raise failure(error, target) from None
    rows = []
    for field, value in info.ListFields():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        rows.append(f"| {field.name.replace('_', ' ')} | {shown.strip().replace(chr(10), ' ')} |")
    table = "\n".join(["| | |", "|---|---|", *rows])
    readme = checkpoint / "README.md" if checkpoint else None
    if readme is None or not readme.is_file():
        return table
    text = readme.read_text(encoding="utf-8")
    if text.startswith("---\n"):  # skip the YAML header
        text = text.partition("\n---\n")[2]
    return f"{text}\n\n## As served\n\n{table}"


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
            server = Server(Options(checkpoint=checkpoint, port=0, grace=2.0))
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


# --- the page -----------------------------------------------------------------------------------


def build(target: str, card: str, max_new_tokens: int = 1024) -> gradio.Blocks:
    """Build the page.

    Args:
        target: ``host:port`` of a server.
        card: Markdown for the second tab.
        max_new_tokens: upper end of the slider.
    """
    import gradio as gr

    page: gradio.Blocks
    with gr.Blocks(title="gpt_dist playground", analytics_enabled=False) as page:
        gr.Markdown("# gpt_dist playground")
        with gr.Tab("Generate"):
            prompt = gr.Textbox("Once upon a time", label="Prompt", lines=4, elem_id="prompt")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                halt = gr.Button("Stop", variant="stop", elem_id="stop")
            with gr.Accordion("Sampling", open=True), gr.Row():
                controls = [
                    gr.Slider(
                        1, MAX_SAMPLES, 2, step=1, label="Samples", info="replies side by side"
                    ),
                    gr.Slider(
                        1,
                        max_new_tokens,
                        min(200, max_new_tokens),
                        step=1,
                        label="Tokens",
                        info="per reply",
                    ),
                    gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: greedy"),
                    gr.Slider(0, 200, 50, step=1, label="Top k", info="0: all"),
                    gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="1: all"),
                    gr.Slider(0, 1, 0, step=0.01, label="Min p", info="0: all"),
                    gr.Slider(1, 2, 1, step=0.05, label="Repetition", info="1: no penalty"),
                    gr.Number(-1, label="Seed", info="-1: any", precision=0, minimum=-1),
                    gr.Textbox("", label="Stop at", info="stop sequence", elem_id="stop-at"),
                ]
            panels = gr.HTML(elem_id="replies")
            status = gr.Markdown(elem_id="status")
        with gr.Tab("Model card"):
            gr.Markdown(card, elem_id="card")

        async def respond(*values: Any) -> AsyncGenerator[tuple[str, str], None]:
            async for update in converse(target, *values):
                yield update

        asked = {"inputs": [prompt, *controls], "outputs": [panels, status]}
        running = gr.on([go.click, prompt.submit], respond, **asked, concurrency_limit=None)
        halt.click(lambda: "stopped", None, status, cancels=[running], queue=False)
    return page


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
        page = build(target, model_card(target, args.checkpoint))
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
