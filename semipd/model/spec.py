"""What a decoder-only model is, as plain values: sizes, biases, rotary scaling, windows, KV cache.

A `ModelSpec` is parsed from a checkpoint's configuration by `model/families.py`; layers and loader read nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from semipd.config import CacheGroup, KVLayout, Shard
from semipd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Llama-3.1's scaling by frequency: long wavelengths divided by `factor`, short ones kept, smooth between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearRopeScaling | Llama3RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of one model.

    Attributes:
        sliding_windows: per layer, tokens that a query reads, itself included; None reads all.
        dtype: the checkpoint's own dtype, what `dtype="auto"` resolves to.
        eos_token_ids: union over config, generation_config and GGUF metadata.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()

    def window(self, layer: int) -> int | None:
        """The sliding window of `layer`; None when it reads every token."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def shard(self, shard: Shard) -> ModelSpec:
        """What a rank computes: its heads, its features of the feed-forward, its rows of the vocabulary.

        KV heads are split, or each is held by several ranks. The parts of the vocabulary are of one size, so that
        together they may have more rows than the whole.

        Raises:
            ConfigError: the model cannot be split among so many.
        """
        if not self._can_be_split(shard.world_size):
            sizes = [str(size) for size in range(1, self.num_heads + 1) if self._can_be_split(size)]
            raise ConfigError(
                f"tensor_parallel_size is {shard.world_size}, but the model has {self.num_heads} query heads, "
                f"{self.num_kv_heads} KV heads and {self.intermediate_size} feed-forward features; expected a divisor "
                "of query heads and of features which divides the KV heads or is a multiple of them: "
                f"{', '.join(sizes)}"
            )
        return replace(
            self,
            vocab_size=-(-self.vocab_size // shard.world_size),
            intermediate_size=self.intermediate_size // shard.world_size,
            num_heads=self.num_heads // shard.world_size,
            num_kv_heads=max(1, self.num_kv_heads // shard.world_size),
        )

    def _can_be_split(self, size: int) -> bool:
        divides_kv_heads = self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0
        return self.num_heads % size == 0 and self.intermediate_size % size == 0 and divides_kv_heads

    def kv_layout(self, dtype_bytes: int) -> KVLayout:
        """The cache groups of this model at `dtype_bytes` an element.

        All layers share one group today; old blocks can go only when every layer has a window, then behind the widest.
        """
        windows = [self.window(layer) for layer in range(self.num_layers)]
        widths = [window for window in windows if window is not None]
        return KVLayout(
            groups=(
                CacheGroup(
                    layers=tuple(range(self.num_layers)),
                    token_shape=(2, self.num_kv_heads, self.head_dim),
                    dtype_bytes=dtype_bytes,
                    window=max(widths) if len(widths) == self.num_layers else None,
                ),
            )
        )
