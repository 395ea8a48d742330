"""A plain-torch judge of what an engine on a GPU generates: teacher-forced logits, in float32 or in the model's dtype.

Shapes: T rows, V vocabulary, B sequences of a batch, C positions of a padded sequence, E heads of the fused projection,
N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from semipd.config import LoadFormat
from semipd.kernels.ops import AttentionSpec, QKNorm, StepContext, create_ops
from semipd.kernels.paged_attention import AttentionMetadata, PrefillMetadata
from semipd.kernels.reference import ReferencePlan
from semipd.memory.kv_cache import KVCache
from semipd.model.decoder import Decoder
from semipd.model.loader import load_spec, load_weights, resolve_model

SMALL = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}

Finished = tuple[Sequence[int], Sequence[int]]
"""Tokens of a prompt and of its output."""

# All but cuDNN, which torch may prefer and which does not take any mask.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_CHUNK = 512  # rows that attend in one call: torch has the scores of all heads of a float32 call in memory


def save_config(folder: Path, config: dict[str, object]) -> Path:
    """Write a config.json for `load_format="dummy"`."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Judge:
    """An engine's weights, rounded as it has them (`drawn_in`), in a decoder of plain torch in `dtype`."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        *,
        drawn_in: torch.dtype,
        load_format: LoadFormat = "dummy",
        device: str = "cuda",
    ) -> None:
        source = resolve_model(str(folder), load_format=load_format)
        self._spec = load_spec(source)
        self._dtype = dtype
        self._device = device
        weights = load_weights(source, self._spec, dtype=drawn_in, device=device)
        weights = {name: value.to(dtype) for name, value in weights.items()}
        self._decoder = Decoder(self._spec, weights, create_ops("reference"))

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits of every position, `[T, V]`."""
        length = len(tokens)
        layout = self._spec.kv_layout(self._dtype.itemsize)
        cache = KVCache(layout=layout, num_blocks=length, block_size=1, dtype=self._dtype, device=self._device)
        at = torch.arange(length, device=self._device)
        chunks = tuple(
            PrefillMetadata(
                row_start=row, num_rows=min(_CHUNK, length - row), start_position=row, block_table_N=at[: row + _CHUNK]
            )
            for row in range(0, length, _CHUNK)
        )
        metadata = AttentionMetadata(
            slot_mapping_T=at,
            num_decodes=0,
            decode_block_table_BN=at[None, :0],
            decode_context_lens_B=at[:0],
            prefills=chunks,
        )
        context = StepContext(num_sms=1)
        plan = ReferencePlan(at, metadata, cache.kv_LPS2KH, self._decoder.attention)
        with sdpa_kernel(_BACKENDS):
            hidden_TD = self._decoder.forward(torch.tensor(list(tokens), device=self._device), plan, context)
        return self._decoder.compute_logits(hidden_TD, context)

    @torch.inference_mode()
    def output_logits(self, batch: Sequence[Finished]) -> Tensor:
        """Logits that chose each output token, one request's after the other's; all in one padded forward pass."""
        tokens = [[*prompt, *output[:-1]] for prompt, output in batch]
        longest = max(map(len, tokens))
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens]).to(self._device)
        rows = [
            torch.arange(len(output)) + index * longest + len(prompt) - 1
            for index, (prompt, output) in enumerate(batch)
        ]
        context = StepContext(num_sms=1)
        plan = _PaddedPlan(len(batch), longest, self._decoder.attention, self._spec.num_kv_heads, self._dtype)
        with sdpa_kernel(_BACKENDS):
            hidden_TD = self._decoder.forward(padded.flatten(), plan, context)
        return self._decoder.compute_logits(hidden_TD[torch.cat(rows).to(self._device)], context).float()


class _PaddedPlan:
    """Attention of sequences of one padded length, each over itself: no pool, and padding is behind what counts."""

    def __init__(
        self, batch_size: int, length: int, spec: AttentionSpec, num_kv_heads: int, dtype: torch.dtype
    ) -> None:
        assert set(spec.windows) == {None}, "windows are the paged reference's"
        positions_C = torch.arange(length, device=spec.inv_freq.device)
        angles_CH = positions_C[:, None] * spec.inv_freq
        self._cos_C1H, self._sin_C1H = angles_CH.cos()[:, None].to(dtype), angles_CH.sin()[:, None].to(dtype)
        self._shape = (batch_size, length)
        self._num_kv_heads = num_kv_heads
        self._scale = spec.scale

    def rotary_write_kv_(self, layer: int, qkv_TEH: Tensor, qk_norm: QKNorm | None, context: StepContext) -> None:
        """Rotates, and keeps K and V until `attend`."""
        assert qk_norm is None, "norms of heads are the paged reference's"
        num_kv_heads = self._num_kv_heads
        qkv_BCEH = qkv_TEH.view(*self._shape, *qkv_TEH.shape[1:])
        qk_BCEH = qkv_BCEH[:, :, :-num_kv_heads]
        low, high = qk_BCEH.chunk(2, -1)
        cos, sin = self._cos_C1H, self._sin_C1H
        qk_BCEH.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), -1))
        self._k_BCKH = qk_BCEH[:, :, -num_kv_heads:]
        self._v_BCKH = qkv_BCEH[:, :, -num_kv_heads:]

    def attend(self, layer: int, q_TNH: Tensor, context: StepContext, **options: object) -> Tensor:
        """Causal attention; there is nothing to prepare for what comes next."""
        q_BNCH = q_TNH.view(*self._shape, *q_TNH.shape[1:]).transpose(1, 2)
        repeats = q_BNCH.shape[1] // self._num_kv_heads  # without them torch has no float32 kernel but the plain one
        k_BNCH, v_BNCH = (x.transpose(1, 2).repeat_interleave(repeats, 1) for x in (self._k_BCKH, self._v_BCKH))
        out_BNCH = F.scaled_dot_product_attention(q_BNCH, k_BNCH, v_BNCH, is_causal=True, scale=self._scale)
        return out_BNCH.transpose(1, 2).flatten(2).flatten(0, 1)


def shortfalls(judge: Judge, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """How far below the judge's best logit each output token lies."""
    return _shortfalls(judge.logits([*prompt, *output])[len(prompt) - 1 : -1].float(), [(prompt, output)])


def batch_shortfalls(judge: Judge, batch: Sequence[Finished]) -> Tensor:
    """The same of all output tokens of several requests, in order."""
    return _shortfalls(judge.output_logits(batch), batch)


def _shortfalls(logits_TV: Tensor, batch: Sequence[Finished]) -> Tensor:
    chosen = torch.tensor([token for _, output in batch for token in output], device=logits_TV.device)
    return logits_TV.amax(1) - logits_TV.gather(1, chosen[:, None]).squeeze(1)


def random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """Tokens of `SMALL`'s vocabulary."""
    rng = random.Random(seed)
    return [[rng.randrange(8192) for _ in range(length)] for length in lengths]


def bfloat16_judge(folder: Path, prompts: Sequence[Sequence[int]]) -> tuple[Judge, float]:
    """The float32 judge of bfloat16 weights, and the largest error of a logit of plain torch in bfloat16."""
    exact = Judge(folder, torch.float32, drawn_in=torch.bfloat16)
    half = Judge(folder, torch.bfloat16, drawn_in=torch.bfloat16)
    return exact, float(max((exact.logits(prompt) - half.logits(prompt)).abs().max() for prompt in prompts))
