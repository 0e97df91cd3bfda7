"""One description for every supported decoder, in this project's own words."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: Base of the geometric progression of wavelengths.
        scaling: "default", "linear" (positions divided by factor), or "llama3" (long wavelengths stretched by factor).
        factor: Stretch of the context.
        low_freq_factor: "llama3": wavelengths above original_positions / low_freq_factor are stretched in full.
        high_freq_factor: "llama3": wavelengths below original_positions / high_freq_factor are left alone.
        original_positions: "llama3": context length before stretching.
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: float = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer of one of the supported families.

    Attributes:
        family: Name of the family's table ("llama", "qwen2", "opt").
        vocabulary: Number of token ids (v).
        layers: Number of blocks (L).
        width: Width of the residual stream (d).
        embedding: Width of the token embedding (e); projected to d where it differs.
        intermediate: MLP channels (f).
        heads: Query heads (n).
        kv_heads: Key/value heads (m), each shared by n / m query heads.
        head_dim: Width of a head (h).
        positions: Longest sequence the positions allow.
        rope: Rotary embedding; None means learned positions.
        position_offset: Rows of the learned position table before position 0.
        norm: "rms" or "layer".
        norm_eps: Added to the variance under the root.
        norm_affine: Whether norms have a scale (and, for "layer", a bias).
        pre_norm: Norm before attention and MLP (True) or after their addition (False).
        final_norm: Whether a norm precedes the head.
        activation: "silu", "relu" or "gelu".
        gated: MLP is act(x gate) * (x up), not act(x up).
        qkv_bias: Biases on the query, key and value projections.
        output_bias: Bias on the attention's output projection.
        mlp_bias: Biases on the MLP's projections.
        tied: The head is the token embedding.
        widths: MLP channels of each layer [L] where they differ, the largest of them being ``intermediate``. Stacked
            parameters have that width in every layer, the narrower ones filled up with channels of zeros, which change
            nothing; a checkpoint holds each layer's own. None where all layers are as wide.
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
    rope: Rope | None
    position_offset: int
    norm: str
    norm_eps: float
    norm_affine: bool
    pre_norm: bool
    final_norm: bool
    activation: str
    gated: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    widths: tuple[int, ...] | None = None

    @property
    def axes(self) -> dict[str, int]:
        """Size of every axis letter of the glossary that weights have."""
        return {
            "v": self.vocabulary,
            "d": self.width,
            "e": self.embedding,
            "f": self.intermediate,
            "n": self.heads,
            "m": self.kv_heads,
            "h": self.head_dim,
            "p": self.positions + self.position_offset,
        }

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """MLP channels of each layer [L], also where all are as wide."""
        return self.widths or (self.intermediate,) * self.layers

    def narrowed(self, intermediate: int) -> "DecoderConfig":
        """The same decoder with another MLP width, that of every layer."""
        return dataclasses.replace(self, intermediate=intermediate, widths=None)

    def with_widths(self, widths: Sequence[int]) -> "DecoderConfig":
        """The same decoder with an MLP width for each layer [L]."""
        alike = len(set(widths)) == 1
        return dataclasses.replace(self, intermediate=max(widths), widths=None if alike else tuple(widths))

    def of_layer(self, index: int) -> "DecoderConfig":
        """The decoder whose layers are all as wide as this one's layer ``index``; itself where they are anyway."""
        return self if self.widths is None else self.narrowed(self.widths[index])

    def with_kv_heads(self, kv_heads: int) -> "DecoderConfig":
        """The same decoder with another number of key/value heads, each shared by as many query heads as before."""
        return dataclasses.replace(self, kv_heads=kv_heads, heads=kv_heads * self.heads // self.kv_heads)
