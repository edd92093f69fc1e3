"""From a language model's token vectors to one vector for each text, inside the program that every engine runs."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corewise.records.pipeline import Pooling

Way = Pooling | Literal["weighted", "sqrt"]
"""What ``pool`` does too: later tokens weigh more, and the sum over the root of the number of tokens."""
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "max", "last", "none")
"""What ``pool`` does; a program that makes vectors by itself has ``own``."""


def pool(hidden: Tensor, mask: Tensor, pooling: Way) -> Tensor:
    """Token vectors (N, tokens, D) and their mask (N, tokens) -> (N, D), or as they are for ``none``.

    As in sentence-transformers: ``mean`` over the mask, ``max`` over the mask, the first token (``cls``), the last one
    that the mask has (``last``), or a ``Way``.
    """
    if pooling == "none":
        return hidden
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        # The last 1 of each row: padding may be on either side.
        positions = torch.arange(1, mask.shape[1] + 1, dtype=mask.dtype, device=mask.device)
        last = (mask * positions).argmax(1)
        return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "max":
        return hidden.masked_fill(weights == 0, -1e9).amax(1)
    if pooling == "weighted":
        weights = weights * torch.arange(1, mask.shape[1] + 1, dtype=hidden.dtype, device=mask.device)[:, None]
    count = weights.sum(1).clamp(min=1e-9)
    return (hidden * weights).sum(1) / (count.sqrt() if pooling == "sqrt" else count)


class Normalized(nn.Module):
    """Vectors (N, D) divided by their L2 norm."""

    def forward(self, vectors: Tensor) -> Tensor:
        """The vectors with norm 1."""
        return nn.functional.normalize(vectors, dim=-1)


class Leading(nn.Module):
    """The leading numbers of vectors, as Matryoshka models are cut."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, vectors: Tensor) -> Tensor:
        """(N, D) -> (N, count)."""
        return vectors[..., : self.count]


class TextVectors(nn.Module):
    """A transformers model, the pooling of its last hidden state, and what comes after: one vector for each text.

    Vectors of several ways to pool are joined to one.
    """

    def __init__(self, encoder: nn.Module, poolings: Sequence[Way], after: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.encoder = encoder
        self.poolings = tuple(poolings)
        self.after = nn.Sequential(*after)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Int64 (N, tokens) twice -> vectors (N, D), or (N, tokens, D) without pooling."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        pooled = [pool(hidden, attention_mask, pooling) for pooling in self.poolings]
        vectors: Tensor = self.after(pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1))
        return vectors


class PooledOutput(nn.Module):
    """The user's own module with pooling after it: the first tensor of its output is (N, tokens, D)."""

    def __init__(self, model: nn.Module, pooling: Pooling, mask: str) -> None:
        super().__init__()
        self.model = model
        self.pooling: Pooling = pooling
        self.mask = mask
        """The name of the input that is the attention mask."""

    def forward(self, **inputs: Tensor) -> Tensor:
        """What the module takes, by name -> vectors (N, D)."""
        return pool(_first(self.model(**inputs)), inputs[self.mask], self.pooling)


def _first(output: Any) -> Tensor:
    """The first tensor of an output: itself, or of a tuple, a dict or a transformers output."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output
