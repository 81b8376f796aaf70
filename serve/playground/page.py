"""The page: what it asks of the server, and what it shows."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from gpt_dist.errors import GptDistError
from serve.client import AsyncClient, Client
from serve.client.connection import TOKEN
from serve.client.words import failure
from serve.playground.replies import Reply, ended, panels

if TYPE_CHECKING:
    import gradio

MAX_SAMPLES = 8
MAX_TOP_K = 200
TOP = 5
"""Number of alternatives shown on hover."""
REFRESH_SECONDS = 0.05
"""Minimum time between two updates of the page."""
BYTES_PER_SECOND = 1e6
"""Each update sends the whole text, so longer replies are updated less often."""


async def converse(
    connection: Mapping[str, Any],
    context: int,
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

    Args:
        connection: arguments of `AsyncClient`.
        context: tokens of prompt and reply that the model takes.
        prompt: and the other settings of the page.

    Yields:
        (panels as HTML, status line).
    """
    replies = [Reply(context) for _ in range(int(samples))]
    status = "waiting"
    yield panels(replies, prompt), status
    due = 0.0
    try:
        async with AsyncClient(**connection) as client:
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
                    content = panels(replies, prompt)
                    yield content, status
                    due = time.monotonic() + REFRESH_SECONDS + len(content) / BYTES_PER_SECOND
        yield panels(replies, prompt), status
    except grpc.RpcError as error:
        begun = panels([reply for reply in replies if reply.tokens], prompt)
        yield ended(begun, "error"), str(_failure(error, connection))


def _failure(error: Any, connection: Mapping[str, Any]) -> GptDistError:
    tls = any(connection.get(flag) for flag in ("tls", "tls_ca", "tls_cert"))
    token = bool(connection.get("token_file") or os.environ.get(TOKEN))
    return failure(error, connection["target"], tls=tls, token=token)


def model_info(connection: Mapping[str, Any]) -> tuple[Any, int]:
    """What the server says of its model, and the number of its slots.

    Args:
        connection: arguments of `Client`.

    Raises:
        GptDistError: the server does not answer.
    """
    try:
        with Client(**connection, timeout=10) as client:
            return client.info(), client.status().max_slots
    except grpc.RpcError as error:
        raise _failure(error, connection) from None


def model_card(info: Any, checkpoint: Path | None) -> str:
    """Describe the served model in Markdown, after an exported model's own README.md."""
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


def build(connection: Mapping[str, Any], info: Any, slots: int, card: str) -> gradio.Blocks:
    """Build the page.

    Args:
        connection: arguments of `AsyncClient`.
        info: from ``model_info``; names the model and bounds the sliders.
        slots: sequences that the server generates at once.
        card: Markdown for the second tab.
    """
    import gradio as gr

    longest = max(2, info.max_context - 1)  # a slider needs two values
    most = max(2, min(MAX_SAMPLES, slots))  # beyond the slots they wait for their turn
    top_k = min(MAX_TOP_K, info.vocab_size)
    page: gradio.Blocks
    with gr.Blocks(title=f"{info.name} · gpt_dist playground", analytics_enabled=False) as page:
        gr.Markdown(
            f"# {info.name}\nweights {info.weights_version} · {info.parameters:,} parameters · "
            f"context of {info.max_context:,} tokens · {info.dtype} on {info.device}",
            elem_id="model",
        )
        with gr.Tab("Generate"):
            prompt = gr.Textbox("Once upon a time", label="Prompt", lines=4, elem_id="prompt")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                halt = gr.Button("Stop", variant="stop", elem_id="stop")
            with gr.Accordion("Sampling", open=True), gr.Row():
                controls = [
                    gr.Slider(
                        1,
                        most,
                        min(2, slots),
                        step=1,
                        label="Samples",
                        info="side by side",
                    ),
                    gr.Slider(
                        1, longest, min(200, longest), step=1, label="Tokens", info="per reply"
                    ),
                    gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: greedy"),
                    gr.Slider(0, top_k, min(50, top_k), step=1, label="Top k", info="0: all"),
                    gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="1: all"),
                    gr.Slider(0, 1, 0, step=0.01, label="Min p", info="0: all"),
                    gr.Slider(1, 2, 1, step=0.05, label="Repetition", info="1: no penalty"),
                    gr.Number(-1, label="Seed", info="-1: any", precision=0, minimum=-1),
                    gr.Textbox("", label="Stop at", info="stop sequence", elem_id="stop-at"),
                ]
            replies = gr.HTML(elem_id="replies")
            status = gr.Markdown(elem_id="status")
        with gr.Tab("Model card"):
            gr.Markdown(card, elem_id="card")

        async def respond(*values: Any) -> AsyncGenerator[tuple[str, str], None]:
            async for update in converse(connection, info.max_context, *values):
                yield update

        def stopped(shown: str) -> tuple[str, str]:
            return ended(shown or "", "stopped"), "stopped"

        asked = {"inputs": [prompt, *controls], "outputs": [replies, status]}
        running = gr.on([go.click, prompt.submit], respond, **asked, concurrency_limit=None)
        # First the end of the stream, then the mark: no update of the stream may come after it.
        halt.click(None, cancels=[running]).then(stopped, replies, [replies, status], queue=False)
    return page
