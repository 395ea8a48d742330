"""The sampling state of slots on a GPU, staged without waiting for it.

What every request has is one row of parameters, which a pinned ring copies on the lane's own stream. The kernels that a
graph captures read those rows, the last tokens and their counts, so these tensors are made once and never replaced.

Tables that few requests need are made, grown and staged on a stream of their own, which never waits for a lane: nobody
reads a slot's rows meanwhile, because a slot changes hands only when no launched step holds its last owner. A step that
uses such tables first lets its stream wait for the last thing staged there, microseconds after it was asked for. A
table that was replaced is kept, for the other lane may still launch steps that read it; sizes double, so all that are
kept are smaller than the table in use.

Shape suffixes: P slots (the last is the null slot, which padding rows use), F parameters of a slot, R rows of a batch,
V vocab.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from semipd.kernels import penalties
from semipd.kernels.sampling import MIN_TOKENS, NUM_PARAMS, REPETITION, TOP_P
from semipd.model.pinned_ring import PinnedRing
from semipd.model.sampling_ops import stream_key_value
from semipd.model.sampling_tables import SamplingTables, repetition_penalty
from semipd.sched.batch import SlotSampling

# A row of parameters as `kernels/sampling.py` reads it, then the last token and the number of outputs to start from.
_ROW = struct.Struct("=3q6d2q")

_NUM_ROWS_UNDER_WAY = 64  # admissions that no stream has reached yet
_NUM_TABLE_ROWS_UNDER_WAY = 4  # half a megabyte each at a vocabulary of 128,256


class CudaSamplingState(SamplingTables):
    """The sampling state of `max_slots` slots and the null slot; logits are scored in float32.

    Attributes:
        params_PF: int64, parameters in the columns of `kernels/sampling.py`.
        last_token_P: int64, what each slot sampled last.
        num_outputs_P: int64, output tokens so far: the index of the next one.
    """

    def __init__(self, *, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._staged = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._retired: list[Tensor] = []
        super().__init__(num_slots=max_slots + 1, vocab_size=vocab_size, device=device, dtype=torch.float32)
        self.params_PF = self._full((max_slots + 1, NUM_PARAMS + 2), 0, torch.int64)
        self._min_tokens_P = self.params_PF[:, MIN_TOKENS.value]
        with self._staging():  # the null slot is greedy and without penalties
            self.params_PF.view(torch.float64)[:, TOP_P.value] = 1
            self.params_PF.view(torch.float64)[:, REPETITION.value] = 1
        self._progress_2P = self._full((2, max_slots + 1), 0, torch.int64)
        self.last_token_P, self.num_outputs_P = self._progress_2P[0], self._progress_2P[1]
        self._param_ring = PinnedRing(num_buffers=_NUM_ROWS_UNDER_WAY, num_bytes=_ROW.size, device=device)
        self._table_ring = PinnedRing(num_buffers=_NUM_TABLE_ROWS_UNDER_WAY, num_bytes=4 * vocab_size, device=device)
        if self._stream is not None:
            self._stream.synchronize()  # once: lanes on any stream may start

    def admit(self, slot: int, sampling: SlotSampling) -> None:
        """Stage a slot's state as it is after `sampling.output_token_ids`; nothing of the slot's last owner is left.

        Work behind it on the current stream finds the slot staged.
        """
        outputs = sampling.output_token_ids
        row = _ROW.pack(
            stream_key_value(sampling.seed, sampling.sample_index),
            sampling.top_k,
            sampling.min_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            repetition_penalty(sampling),
            outputs[-1] if outputs else 0,
            len(outputs),
        )
        with self._lock:
            self._param_ring.copy(torch.frombuffer(bytearray(row), dtype=torch.int64), self.params_PF[slot])
            self._progress_2P[:, slot] = self.params_PF[slot, NUM_PARAMS:]
            self._stage(slot, sampling)

    def apply_penalties(self, logits_RV: Tensor, slots_R: Tensor) -> Tensor:
        """New logits: repetition_penalty on tokens of prompt and output, then frequency and presence on the output's.

        Logits of rows without penalties keep their values.
        """
        seen_PV = self._seen_PV
        if seen_PV is None:
            return logits_RV
        self._await_staged()
        scores_RV = torch.empty_like(logits_RV, dtype=torch.float32)
        penalties.apply_penalties(logits_RV, slots_R, self.params_PF, seen_PV, scores_RV)
        return scores_RV

    def warm_up(self) -> None:
        """Compile and load the kernel of penalties."""
        logits_RV = torch.zeros(1, self._vocab_size, device=self._device)
        seen_PV = torch.zeros(1, self._vocab_size, dtype=torch.int32, device=self._device)
        slots_R = torch.zeros(1, dtype=torch.int64, device=self._device)
        penalties.apply_penalties(logits_RV, slots_R, self.params_PF, seen_PV, logits_RV)

    def _grown(self, table: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        sizes = tuple((1 << size.bit_length()) - 1 for size in sizes)  # 63 fits the remembered tokens, 64 would not
        with self._staging():
            grown = super()._grown(table, sizes, dtype)
        if table is not None and grown is not table:
            self._retired.append(table)
        return grown

    def _full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        with self._staging():
            return super()._full(shape, value, dtype)

    def _write(self, table: Tensor, slot: int, row: Tensor | float) -> None:
        with self._staging():
            if isinstance(row, Tensor):
                self._table_ring.copy(row, table[slot])
            else:
                table[slot] = row

    @contextmanager
    def _staging(self) -> Iterator[None]:
        """Work in this context runs on the staging stream, and `_await_staged` waits for it."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._staged.record()

    def _await_staged(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._staged)
