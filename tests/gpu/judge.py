"""A plain-torch judge of what an engine on a GPU generates: teacher-forced logits in float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from semipd.kernels.ops import StepContext, create_ops
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


def save_config(folder: Path, config: dict[str, object]) -> Path:
    """Write a config.json for `load_format="dummy"`."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Judge:
    """The weights that an engine draws from the same seed, in a decoder of plain torch in `dtype`."""

    def __init__(self, folder: Path, dtype: torch.dtype, *, drawn_in: torch.dtype) -> None:
        source = resolve_model(str(folder), load_format="dummy")
        self._spec = load_spec(source)
        self._dtype = dtype
        weights = load_weights(source, self._spec, dtype=drawn_in, device="cuda")
        weights = {name: value.to(dtype) for name, value in weights.items()}
        self._decoder = Decoder(self._spec, weights, create_ops("reference"))

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits of every position, `[T, V]`."""
        length = len(tokens)
        layout = self._spec.kv_layout(self._dtype.itemsize)
        cache = KVCache(layout=layout, num_blocks=length, block_size=1, dtype=self._dtype, device="cuda")
        at = torch.arange(length, device="cuda")
        chunk = PrefillMetadata(row_start=0, num_rows=length, start_position=0, block_table_N=at)
        metadata = AttentionMetadata(
            slot_mapping_T=at,
            num_decodes=0,
            decode_block_table_BN=at[None, :0],
            decode_context_lens_B=at[:0],
            prefills=(chunk,),
        )
        context = StepContext(num_sms=1)
        plan = ReferencePlan(at, metadata, cache.kv_LPS2KH, self._decoder.attention)
        hidden_TD = self._decoder.forward(torch.tensor(list(tokens), device="cuda"), plan, context)
        return self._decoder.compute_logits(hidden_TD, context)


def shortfalls(judge: Judge, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """How far below the judge's best logit each output token lies."""
    logits = judge.logits([*prompt, *output])[len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(list(output), device="cuda")[:, None]).squeeze(1)
    return logits.amax(1) - chosen
