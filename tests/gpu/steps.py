"""Steps of chosen shapes on the engine's own runner, without a scheduler, and the logits of all their rows.

The request of a slot goes through a sequence of tokens that was drawn for it, whatever the model would have said: so a
judge's forward pass over each sequence tells what every row of any step should be. Blocks lie in the pool in random
order, and what was not written yet is NaN.

Shapes: T tokens of all sequences, R rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from semipd.config import Phase
from semipd.kernels.ops import StepContext
from semipd.memory.kv_cache import KVCache
from semipd.model.gpu_runner import GpuRunner
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, SamplingFeature, SlotSampling

Chunk = tuple[int, int]
"""A slot, and how many more of its tokens to compute."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Logits `[R, V]`, and for each row which token they follow, counted through all sequences."""

    tokens_R: list[int]
    logits_RV: Tensor


class Steps:
    """The steps of one runner.

    Args:
        runner: over `kv_cache`.
        sequences: of each slot.
        num_sms: units of the whole device.
        wait_for_graphs: returns when what was asked of the graphs is captured.
    """

    def __init__(
        self,
        runner: GpuRunner,
        kv_cache: KVCache,
        sequences: Sequence[Sequence[int]],
        num_sms: int,
        wait_for_graphs: Callable[[], None] = lambda: None,
    ) -> None:
        self.lengths: dict[int, int] = {}
        self.wait_for_graphs = wait_for_graphs
        self._runner = runner
        self._kv_cache = kv_cache
        self._sequences = sequences
        self._first_tokens = [0, *accumulate(map(len, sequences))]
        self._num_sms = num_sms
        self._step_id = 0
        self._random = random.Random(0)
        self._blocks: dict[int, tuple[int, ...]] = {}

    def open(self, slots: Iterable[int]) -> None:
        """Forget all requests; from now on these slots have room for their sequences."""
        block_size, num_blocks = self._kv_cache.block_size, self._kv_cache.num_blocks
        with torch.inference_mode():
            self._kv_cache.fill_(float("nan"))
        self._synchronize()
        counts = {slot: -(-len(self._sequences[slot]) // block_size) for slot in slots}
        free = self._random.sample(range(num_blocks), sum(counts.values()))
        self._blocks = {slot: tuple(free.pop() for _ in range(count)) for slot, count in counts.items()}
        self.lengths = dict.fromkeys(counts, 0)

    def fill(self, lengths: Mapping[int, int], rows_per_step: int) -> None:
        """Prefill slots up to these lengths."""
        for slot, length in lengths.items():
            while (missing := length - self.lengths[slot]) > 0:
                self.prefill([(slot, min(missing, rows_per_step))])

    def prefill(self, chunks: Sequence[Chunk], num_sms: int | None = None) -> Rows:
        """A step of the prefill lane; each chunk samples, so its last row comes from the head's graph too."""
        return self._run(Phase.PREFILL, (), chunks, num_sms)

    def decode(self, slots: Sequence[int], num_sms: int | None = None, chunks: Sequence[Chunk] = ()) -> Rows:
        """A step of the decode lane; with chunks a MIXED one."""
        last_token = self._runner._sampler.last_token
        fed = [self._sequences[slot][self.lengths[slot]] for slot in slots]
        with torch.inference_mode():
            last_token[list(slots)] = torch.tensor(fed, dtype=last_token.dtype, device=last_token.device)
        self._synchronize()
        return self._run(Phase.DECODE, slots, chunks, num_sms)

    def repeat_block(self, slot: int, index: int) -> None:
        """Plant a fault: the device takes a block of the slot for the one before it too."""
        with torch.inference_mode():
            self._runner._block_table_XN[slot, index - 1] = self._blocks[slot][index]
        self._synchronize()

    @torch.inference_mode()
    def _run(self, phase: Phase, slots: Sequence[int], chunks: Sequence[Chunk], num_sms: int | None) -> Rows:
        num_sms = num_sms or self._num_sms
        batch = self._batch(phase, num_sms, slots, chunks)
        self._runner.execute(batch).wait()
        lane = self._runner._lanes[phase]
        sampled = [self._advance(slot, 1)[0] for slot in slots]
        computed = [self._advance(slot, count) for slot, count in chunks]
        sampled += [tokens[-1] for tokens in computed]
        prompt = [token for tokens in computed for token in tokens]
        logits = [lane.logits_RV[: len(sampled)].clone()]
        if prompt:
            hidden_TD = lane.hidden_TD[len(slots) : len(slots) + len(prompt)]
            logits.append(self._runner._decoder.compute_logits(hidden_TD, StepContext(num_sms)))
        return Rows([*sampled, *prompt], torch.cat(logits))

    def _advance(self, slot: int, count: int) -> range:
        """The slot's next tokens, counted through all sequences."""
        start = self._first_tokens[slot] + self.lengths[slot]
        self.lengths[slot] += count
        return range(start, start + count)

    def _batch(self, phase: Phase, num_sms: int, slots: Sequence[int], chunks: Sequence[Chunk]) -> Batch:
        entries, updates = [], []
        for slot, count in chunks:
            start, admit = self.lengths[slot], None
            if start == 0:
                admit = SlotSampling(seed=0, sample_index=0, prompt_token_ids=(), temperature=0.0)
                updates.append(BlockUpdate(slot, 0, self._blocks[slot]))
            token_ids = tuple(self._sequences[slot][start : start + count])
            entries.append(PrefillEntry(slot, start, token_ids, samples=True, admit=admit))
        self._step_id += 1
        return Batch(
            step_id=self._step_id,
            phase=phase,
            num_sms=num_sms,
            decode_slots=tuple(slots),
            prefill=tuple(entries),
            block_updates=tuple(updates),
            features=SamplingFeature.NONE,
        )

    def _synchronize(self) -> None:
        """Wait for this thread's own work; waiting for the whole device would disturb a capture."""
        if self._kv_cache.kv_LPS2KH.is_cuda:
            torch.cuda.current_stream().synchronize()


class Errors:
    """How far logits are from those of float32, in units of what plain torch in bfloat16 is off by on the same rows.

    Both are roots of sums of squares over all logits of rows.

    Args:
        references: for each sequence its logits in float32 and those of plain torch in bfloat16.
    """

    def __init__(self, references: Iterable[tuple[Tensor, Tensor]]) -> None:
        exact, plain = [], []
        for exact_TV, plain_TV in references:
            exact.append(exact_TV)
            plain.append(_squares(plain_TV, exact_TV))
        self._exact_TV, self._plain_T = torch.cat(exact), torch.cat(plain)
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._mine, self._plain, self.worst, self.num_rows = 0.0, 0.0, 0.0, 0

    def add(self, rows: Rows) -> float:
        """Count these rows, whose own ratio is returned. NaN anywhere makes it NaN, and `ratio` and `worst` too."""
        tokens_R = torch.tensor(rows.tokens_R, device=self._plain_T.device)
        mine = float(_squares(rows.logits_RV, self._exact_TV, tokens_R).double().sum())
        plain = float(self._plain_T[tokens_R].double().sum())
        self._mine += mine
        self._plain += plain
        self.num_rows += len(rows.tokens_R)
        ratio: float = (mine / plain) ** 0.5
        self.worst = ratio if ratio != ratio else max(self.worst, ratio)
        return ratio

    @property
    def ratio(self) -> float:
        """Of all rows since `clear`."""
        ratio: float = (self._mine / self._plain) ** 0.5
        return ratio


def _squares(logits_RV: Tensor, exact_TV: Tensor, tokens_R: Tensor | None = None) -> Tensor:
    """Of each row the sum of its squared errors; in parts, which need less memory."""
    sums = []
    for first in range(0, len(logits_RV), 2048):
        part = slice(first, first + 2048)
        exact_RV = exact_TV[part] if tokens_R is None else exact_TV[tokens_R[part]]
        sums.append((logits_RV[part].float() - exact_RV).square().sum(1))
    return torch.cat(sums)
