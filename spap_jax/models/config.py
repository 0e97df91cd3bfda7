"""One config for every supported decoder, with this project's own field names."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: Base of the geometric progression of wavelengths.
        scaling: "default", "linear" (positions divided by factor), "llama3" (long wavelengths stretched by factor), or
            "yarn" (as "llama3", by a ramp over channels, and cosines and sines multiplied; Peng et al. 2023).
        factor: Stretch of the context.
        low_freq_factor: "llama3": wavelengths above original_positions / low_freq_factor are stretched in full.
        high_freq_factor: "llama3": wavelengths below original_positions / high_freq_factor are left alone.
        original_positions: "llama3", "yarn": context length before stretching.
        beta_fast: "yarn": wavelengths that fit the original context this many times are left alone.
        beta_slow: "yarn": those that fit it at most this many times are stretched in full.
        attention_factor: Factor of the cosines and sines.
        share: Fraction of the channels of a head that are rotated, the first ones.
        interleaved: Whether the two channels of a pair are neighbours, and not half of the rotated channels apart.
        query_growth: Queries at position p are multiplied by 1 + query_growth * log(1 + p // original_positions).
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: float = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    share: float = 1.0
    interleaved: bool = False
    query_growth: float = 0.0


@dataclass(frozen=True)
class AttentionKind:
    """What a layer's attention knows of positions, and how far back it looks.

    Attributes:
        rope: Rotary embedding of queries and keys; None if they have none.
        window: Number of positions that a query attends to, its own included; None for all up to its own.
    """

    rope: Rope | None
    window: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer of one of the supported families.

    Attributes:
        family: Name of the family's table ("llama", "qwen2", ...).
        vocabulary: Number of token ids (v).
        layers: Number of blocks (L).
        width: Width of the residual stream (d).
        embedding: Width of the token embedding (e); projected to d if it differs from d.
        intermediate: MLP channels (f).
        heads: Query heads (n).
        kv_heads: Key/value heads (m), each shared by n / m query heads.
        head_dim: Width of a head (h).
        positions: Maximum sequence length.
        position_offset: Rows of the learned position table before position 0; None without learned positions.
        norm: "rms" or "layer".
        norm_eps: Epsilon added to the variance under the square root.
        norm_affine: Whether norms have a scale (and, for "layer", a bias).
        norms: What a block normalises: the "input" of attention and MLP, their "output" before it is added to the
            residual stream, or the "sum", which is the stream after the addition.
        final_norm: Whether a norm precedes the head.
        activation: "silu", "relu", "gelu", or "gelu_pytorch_tanh", its approximation.
        gated: Whether the MLP is act(x gate) * (x up) rather than act(x up).
        output_bias: Whether the attention's output projection has a bias.
        tied: Whether the head shares its weights with the token embedding.
        norm_shift: Added to the scale of every norm; 1 if a stored scale of 0 leaves the norm's input as it is.
        query_key_norm: What queries and keys are normalised over before they are rotated: each "head", or "all" heads
            together; None without such norms.
        query_scale: Factor of the queries, besides that of the attention scores, 1 / sqrt(h).
        embedding_scale: Factor of the embedded tokens.
        residual_scale: Factor of what attention and MLP add to the residual stream.
        logit_scale: Factor of the logits.
        score_cap: Bound of the attention scores, which a tanh keeps within it; None without.
        logit_cap: The same of the logits.
        layer_kinds: Index in ``attention_kinds`` of each layer [L]; None if all layers have the only one.
        widths: MLP channels of each layer [L] if they differ; the largest is ``intermediate``. Stacked parameters are
            padded to it with zero channels; a checkpoint stores each layer at its own width. None if all are alike.
        prefix: What the names of the tensors but the head's begin with in the checkpoint.
    """

    family: str
    vocabulary: int
    layers: int
    width: int
    embedding: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    attention_kinds: tuple[AttentionKind, ...]
    position_offset: int | None
    norm: str
    norm_eps: float
    norm_affine: bool
    norms: tuple[str, ...]
    final_norm: bool
    activation: str
    gated: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    norm_shift: float = 0.0
    query_key_norm: str | None = None
    query_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None
    layer_kinds: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    prefix: str = "model."

    @property
    def in_tower(self) -> bool:
        """Whether the decoder is part of a model that reads more than text; see `towers`."""
        return self.prefix != "model."

    @property
    def head_name(self) -> str:
        """Name of the head's tensor in the checkpoint."""
        outer = self.prefix.removesuffix("model.") if f".{self.prefix}".endswith(".model.") else ""
        return f"{outer}lm_head.weight"

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the weights' axes, by the axis letters of the glossary."""
        return {
            "v": self.vocabulary,
            "d": self.width,
            "e": self.embedding,
            "f": self.intermediate,
            "n": self.heads,
            "m": self.kv_heads,
            "h": self.head_dim,
            "p": self.positions + (self.position_offset or 0),
        }

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """MLP channels of each layer [L], also if all are equal."""
        return self.widths or (self.intermediate,) * self.layers

    def narrowed(self, intermediate: int) -> "DecoderConfig":
        """Returns the same config with the given MLP width in every layer."""
        return dataclasses.replace(self, intermediate=intermediate, widths=None)

    def with_widths(self, widths: Sequence[int]) -> "DecoderConfig":
        """Returns the same config with an MLP width for each layer [L]."""
        alike = len(set(widths)) == 1
        return dataclasses.replace(self, intermediate=max(widths), widths=None if alike else tuple(widths))

    def of_layer(self, index: int) -> "DecoderConfig":
        """Returns the config with every layer like layer ``index``; itself if all layers are alike."""
        own = self.attending_like(index)
        return own if self.widths is None else own.narrowed(self.widths[index])

    def attending_like(self, index: int) -> "DecoderConfig":
        """Returns the config with the kind of attention of layer ``index`` in every layer."""
        if self.layer_kinds is None:
            return self
        return dataclasses.replace(
            self, attention_kinds=(self.attention_kinds[self.layer_kinds[index]],), layer_kinds=None
        )

    def of_blocks(self, numbers: Sequence[int]) -> "DecoderConfig":
        """Returns the config of some blocks alone, stacked as wide as among all of them."""
        by_layer = {name: getattr(self, name) for name in ("layer_kinds", "widths")}
        own = {name: values and tuple(values[number] for number in numbers) for name, values in by_layer.items()}
        return dataclasses.replace(self, layers=len(numbers), **own)

    def last(self, layers: int) -> "DecoderConfig":
        """Returns the config of the last ``layers`` blocks alone; see `of_blocks`."""
        return self.of_blocks(range(self.layers - layers, self.layers))

    def with_kv_heads(self, kv_heads: int) -> "DecoderConfig":
        """Returns the same config with another number of key/value heads and as many query heads per key/value head."""
        return dataclasses.replace(self, kv_heads=kv_heads, heads=kv_heads * self.heads // self.kv_heads)
