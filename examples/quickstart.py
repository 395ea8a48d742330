"""Several people ask at different times; one engine on this machine answers them side by side.

python examples/quickstart.py --model FOLDER_FILE_OR_HUB_ID ["prompt" ...]
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from semipd import SLO, Engine, RequestOutput, SamplingParams

PROMPTS = [
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about the first snow.",
    "What is the capital of Australia, and what is it known for?",
    "Give me three tips for learning to cook.",
]
PAUSE = 0.7  # seconds between two people


@dataclass
class Conversation:
    """One person's question and what came back so far."""

    question: str
    text: str = ""
    output: RequestOutput | None = None
    error: BaseException | None = field(default=None, repr=False)

    def ask(self, engine: Engine, params: SamplingParams) -> None:
        """Stream the answer; runs in a thread of its own, as a web request would."""
        try:
            token_ids = engine.apply_chat_template([{"role": "user", "content": self.question}])
            with engine.stream(token_ids, params) as stream:
                for delta in stream:
                    self.text += delta.outputs[0].text
                self.output = stream.result()
        except BaseException as error:  # shown by the main thread
            self.error = error

    def panel(self, width: int) -> Panel:
        """The conversation as a box; green once it is complete."""
        body = f"[dim]{escape(self.question)}[/dim]\n\n{escape(self.text.strip())}"  # a model may write [brackets]
        return Panel(body, width=width, border_style="green" if self.output else "yellow")


def serve(engine: Engine, conversations: list[Conversation], params: SamplingParams, console: Console) -> None:
    """Let each person ask a little later than the one before, and show all answers as they grow."""
    width = max(40, console.width // min(2, len(conversations)) - 1)
    threads: list[threading.Thread] = []
    with Live(console=console, refresh_per_second=8, vertical_overflow="visible", transient=False) as live:
        for conversation in conversations:
            thread = threading.Thread(target=conversation.ask, args=(engine, params))
            thread.start()
            threads.append(thread)
            until = time.monotonic() + PAUSE
            while time.monotonic() < until or (
                len(threads) == len(conversations) and any(t.is_alive() for t in threads)
            ):
                if console.is_terminal:
                    live.update(Columns([c.panel(width) for c in conversations[: len(threads)]]))
                time.sleep(0.1)
        live.update(Columns([c.panel(width) for c in conversations]))


def report(conversations: list[Conversation], slo: SLO) -> Table:
    """What each person waited for."""
    table = Table(title="what each request saw")
    for name in ("request", "prompt tokens", "tokens", "TTFT", "TPOT", "worst gap", "SLO", "ended by"):
        table.add_column(name, justify="right")
    for conversation in conversations:
        assert conversation.output is not None
        (result,) = conversation.output.outputs
        timings = result.timings
        assert timings is not None
        table.add_row(
            conversation.output.request_id,
            str(len(conversation.output.prompt_token_ids)),
            str(len(result.token_ids)),
            _milliseconds(timings.ttft),
            _milliseconds(timings.tpot),
            _milliseconds(timings.worst_gap),
            "met" if result.slo_attained else "missed",
            str(result.finish_reason),
        )
    table.caption = f"SLO: TTFT {_milliseconds(slo.ttft)}, TPOT {_milliseconds(slo.tpot)}"
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("prompts", nargs="*", help="questions to ask instead of the built-in ones")
    args = parser.parse_args()

    console = Console()
    slo = SLO(ttft=1.0, tpot=0.2)
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=7, max_tokens=args.max_tokens)
    conversations = [Conversation(question) for question in args.prompts or PROMPTS]
    started = time.monotonic()
    with Engine(args.model, slo=slo) as engine:
        console.print(f"engine ready in {time.monotonic() - started:.1f} s: {args.model}, {engine.config.policy}")
        serve(engine, conversations, params, console)
        for conversation in conversations:
            if conversation.error is not None:
                sys.exit(f"{conversation.question!r} failed: {conversation.error!r}")
        console.print()
        console.print(report(conversations, slo))


if __name__ == "__main__":
    main()
