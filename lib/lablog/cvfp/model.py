"""The CVFP network: residual layers that update a context vector token by token.

One layer maps (context, token) to (context, token). Every function here takes many tokens at
once, shape [n, width]; a recurrence over tokens is the business of the callers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NewType, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Both are [n, width] and equally wide by default, so only the type checker and a numeric test
# can tell a swapped call from a right one.
Context = NewType("Context", Tensor)
Token = NewType("Token", Tensor)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Widths, depth and initialisation (the log: 768, 768, 6, 1.0, 0.1, 0.01).

    `layernorm_mix` m gives out = (1 - m) x + m LayerNorm(x); `weight_std` and `bias_std` are the
    deviations of the initial normal weights and biases. Raises ValueError for m outside [0, 1]
    and for widths or a number of layers below 1.
    """

    context_dim: int
    embed_dim: int
    num_layers: int
    layernorm_mix: float
    weight_std: float
    bias_std: float

    def __post_init__(self) -> None:
        if not 0 <= self.layernorm_mix <= 1:
            raise ValueError(f"layernorm_mix = {self.layernorm_mix}, expected 0 (none) to 1 (full)")
        if min(self.context_dim, self.embed_dim, self.num_layers) < 1:
            raise ValueError(f"widths and num_layers must be at least 1: {asdict(self)}")

    @property
    def hidden_dim(self) -> int:
        """Width of a layer, which reads and writes context and token side by side."""
        return self.context_dim + self.embed_dim

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the matrix products for one token, forward only."""
        return self.num_layers * 2 * self.hidden_dim**2


def mix_norm(x: Tensor, norm: nn.LayerNorm, mix: float) -> Tensor:
    """(1 - mix) x + mix LayerNorm(x); the limits cost nothing extra."""
    if mix == 0:
        return x
    normed = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return normed if mix == 1 else torch.lerp(x, normed, mix)


class CVFPLayer(nn.Module):
    """x + ReLU(W x + b) on x = [context, token], then a LayerNorm on each half."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.context_norm = nn.LayerNorm(config.context_dim)
        self.token_norm = nn.LayerNorm(config.embed_dim)
        nn.init.normal_(self.linear.weight, std=config.weight_std, generator=generator)
        nn.init.normal_(self.linear.bias, std=config.bias_std, generator=generator)

    def forward(self, context: Context, token: Token) -> tuple[Context, Token]:
        """[n, context_dim], [n, embed_dim] to the same shapes."""
        return self.residual(context, token, self.linear(torch.cat([context, token], dim=-1)))

    def residual(
        self, context: Context, token: Token, preactivation: Tensor
    ) -> tuple[Context, Token]:
        """The layer after its matrix product, whose result is `preactivation` [n, hidden_dim]."""
        split, mix = self.config.context_dim, self.config.layernorm_mix
        delta = F.relu(preactivation)
        return (
            Context(mix_norm(context + delta[..., :split], self.context_norm, mix)),
            Token(mix_norm(token + delta[..., split:], self.token_norm, mix)),
        )


class CVFPBlock(nn.Module):
    """`num_layers` layers in sequence, initialised on the CPU from `seed` alone."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(CVFPLayer(config, generator) for _ in range(config.num_layers))

    @property
    def stack(self) -> list[CVFPLayer]:
        """The layers with their type, which ``ModuleList`` forgets."""
        return [cast(CVFPLayer, layer) for layer in self.layers]

    def forward(self, context: Context, token: Token) -> tuple[Context, Token]:
        """[n, context_dim], [n, embed_dim] to the same shapes; ValueError for other widths."""
        check_widths(self.config, context, token)
        for layer in self.layers:
            context, token = layer(context, token)
        return context, token

    def chunked(self, context: Tensor, token: Tensor, rows: int = 1600) -> Tensor:
        """New contexts [n, context_dim], `rows` tokens at a time.

        Blocks of this size stay below the size from which the allocator returns memory to the
        system after every operation; measured, it is neither slower nor faster than one batch
        on an idle machine and takes less memory without gradients.
        """
        parts = [
            self(Context(c), Token(t))[0]
            for c, t in zip(context.split(rows), token.split(rows), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_widths(config: ModelConfig, context: Tensor, token: Tensor) -> None:
    """Raise ValueError unless the last dimensions are (context_dim, embed_dim) in this order."""
    got, want = (context.shape[-1], token.shape[-1]), (config.context_dim, config.embed_dim)
    if got != want:
        raise ValueError(
            f"block(context, token) got widths {got}, expected {want}; arguments swapped?"
        )


def check_normalised(tokens: Tensor) -> None:
    """Raise ValueError for a row of tokens [n, embed_dim] that no :class:`TokenEmbedding` gives.

    Its rows have mean 0 and mean square 1, or are zero where the embedding knows nothing of the
    token; below 1 they fall where the raw row was small against LayerNorm's epsilon.
    """
    mean, square = tokens.mean(1).abs(), tokens.square().mean(1)
    wrong = (mean > 1e-3) | (square > 1.001) | ((square < 0.5) & (square > 0))
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(
            f"token {row} of {len(tokens)} is not normalised (mean {tokens[row].mean():.3g}, mean "
            f"square {square[row]:.3g}, expected 0 and 1): take tokens from TokenEmbedding"
        )


class TokenEmbedding(nn.Module):
    """Frozen embedding [vocabulary, embed_dim] followed by a LayerNorm that is always applied."""

    table: Tensor

    def __init__(self, table: Tensor, config: ModelConfig) -> None:
        super().__init__()
        if table.ndim != 2 or table.shape[1] != config.embed_dim:
            raise ValueError(
                f"embedding of shape {tuple(table.shape)}, expected [vocabulary, "
                f"{config.embed_dim}]: choose a source of that width or change embed_dim"
            )
        self.register_buffer("table", F.layer_norm(table.float(), (config.embed_dim,)))

    def forward(self, ids: Tensor) -> Token:
        """Normalised embeddings [n, embed_dim] of ids [n]; IndexError for ids out of range."""
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < len(self.table)):
            raise IndexError(
                f"token ids {int(ids.min())}..{int(ids.max())} outside the embedding's "
                f"0..{len(self.table) - 1}: was the text encoded with another tokenizer?"
            )
        return Token(self.table[ids])


def shifted(contexts: Tensor, start: Tensor) -> Tensor:
    """What each token starts from: row i is contexts[i-1], row 0 is `start` [context_dim]."""
    return torch.cat([start.unsqueeze(0), contexts[:-1]])
