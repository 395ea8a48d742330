"""What a finished step has for the users."""

from __future__ import annotations

from dataclasses import dataclass, field

from semipd.request import Request
from semipd.sched.batch import TokenLogprobs


@dataclass(slots=True)
class StepEvents:
    """The news of one commit or abort: one outbox item a step, never one a token.

    Attributes:
        time: monotonic clock of the step's done event, in seconds.
        requests: those that got a token, in step with `token_ids` and, if any asked, `logprobs`.
        prompt_logprobs: requests whose prompt log-probabilities grew, with the new positions.
        finished: requests that ended, after their last token.
    """

    time: float
    requests: list[Request] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: list[tuple[Request, tuple[TokenLogprobs, ...]]] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.requests or self.finished or self.prompt_logprobs)
