"""Replies as they grow, and how the page shows them: a panel each, coloured by probability."""

from __future__ import annotations

import codecs
import html
import math
from typing import Any, NamedTuple

from serve.client.words import ending

CSS = """
.replies { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
.reply { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .8rem; }
.reply pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-family: inherit; }
.reply b { font-weight: normal; opacity: .55; }
.reply i, .legend i { font-style: normal; position: relative; }
.reply i:hover { outline: 1px solid currentColor; cursor: help; }
.reply i:hover::after {
  content: attr(data-hint); position: absolute; left: 0; top: 1.6em; z-index: 9; white-space: pre;
  padding: .5rem .7rem; border-radius: 6px; font: .8rem/1.5 monospace;
  color: #eee; background: #222e;
}
.reply footer { margin-top: .6rem; font-size: .8em; opacity: .7; }
.legend { margin-bottom: .6rem; font-size: .8em; opacity: .8; }
.legend i { display: inline-block; width: 1.6em; height: 1em; vertical-align: -.15em; }
""" + "".join(
    # From red (unlikely) to green (likely), in tenths.
    f".reply i.p{tenth}, .legend i.p{tenth} {{ background: hsl({13 * tenth} 70% 50% / .22); }}\n"
    for tenth in range(10)
)

LEGEND = (
    '<div class="legend">Each token\'s probability: 0 % '
    + "".join(f'<i class="p{tenth}"></i>' for tenth in range(10))
    + " 100 %. Hover over a token for the likeliest ones at its place.</div>"
)

GROWING = "…"
"""In place of the reason for its end, while a reply grows."""


class Piece(NamedTuple):
    """Text of one token, or of several tokens that form one character together."""

    text: str
    probability: float
    hint: str


class Reply:
    """One continuation as it grows.

    Args:
        context: tokens of prompt and continuation that the model takes.
    """

    def __init__(self, context: int) -> None:
        self._context = context
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
            self.end = ending(message.finished, self.tokens, self._context)

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
        state = html.escape(self.end) or GROWING
        return (
            f'<div class="reply"><pre><b>{html.escape(prompt)}</b>'
            f"{''.join(spans)}</pre><footer>{self.tokens} tokens · {state}</footer></div>"
        )


def panels(replies: list[Reply], prompt: str) -> str:
    """All replies side by side, under a legend of their colours; nothing without replies."""
    if not replies:
        return ""
    return f'{LEGEND}<div class="replies">{"".join(r.html(prompt) for r in replies)}</div>'


def ended(shown: str, how: str) -> str:
    """Panels as they are shown, where those that grew have ended."""
    return shown.replace(f" · {GROWING}</footer>", f" · {html.escape(how)}</footer>")


def hint(entry: Any) -> str:
    """Hover text of a token: its probability, and the most likely tokens at its place."""
    lines = [f"{quote(entry.token)}  {math.exp(entry.logprob):.1%}", ""]
    lines += [f"{math.exp(top.logprob):6.1%}  {quote(top.token)}" for top in entry.top]
    return "\n".join(lines)


def quote(token: bytes) -> str:
    """A token's text with visible white space."""
    return repr(token.decode("utf-8", errors="replace"))
