"""The pre-norm transformer block of the ViT and the transformer predictor."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A pre-norm transformer block (Vaswani et al. 2017): x + attention(norm(x)), then x + MLP(norm(x)).

    The hidden layer of the MLP is four times as wide as the block. With `checkpointed`, training stores only the
    block's input and recomputes the activations for the gradient.
    """

    checkpointed = False

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Float[Tensor, "R L W"]) -> Float[Tensor, "R L W"]:
        """Mix the L tokens of each of R sequences."""
        if self.checkpointed and self.training and torch.is_grad_enabled():
            mixed: Tensor = checkpoint(self._mix, tokens, use_reentrant=False)
            return mixed
        return self._mix(tokens)

    def _mix(self, tokens: Float[Tensor, "R L W"]) -> Float[Tensor, "R L W"]:
        joined = self.queries_keys_values(self.attention_norm(tokens))
        queries, keys, values = joined.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        tokens = tokens + self.project(mixed.transpose(1, 2).flatten(2))
        mixed_channels: Tensor = self.mlp(tokens)
        return tokens + mixed_channels
