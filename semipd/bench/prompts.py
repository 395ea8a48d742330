"""What prompts say: random tokens, or random words of about as many tokens.

A run has a number, and no two runs of one command share a prompt: otherwise the prefix cache of one would serve the
next. The same run offers the same prompts to every target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from semipd.bench.schedule import PlannedRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Common words, each one token with its space in the vocabularies of current models.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMaker:
    """Makes the prompts of one run.

    Attributes:
        vocab_size: token ids are below it.
        seed: of everything.
        run: the number of the run.
    """

    vocab_size: int
    seed: int
    run: int

    def token_ids(self, request: PlannedRequest) -> NDArray[np.int64]:
        """The prompt as token ids."""
        return self._draw(request, self.vocab_size)

    def text(self, request: PlannedRequest) -> str:
        """The prompt as text of about as many tokens as asked for."""
        return " ".join([_WORDS[index] for index in self._draw(request, len(_WORDS))])

    def _draw(self, request: PlannedRequest, size: int) -> NDArray[np.int64]:
        shared = np.random.default_rng([self.seed, self.run, 0, request.prefix_group])
        own = np.random.default_rng([self.seed, self.run, 1, request.index])
        num_own = request.num_prompt_tokens - request.num_shared_tokens
        head = shared.integers(size, size=request.num_shared_tokens)
        return np.concatenate([head, own.integers(size, size=num_own)])
