"""Several texts in one row: the program that keeps them apart, made from a model that pools its tokens' vectors.

A row's texts lie one behind another. Each token sees the tokens of its own text (a block-diagonal mask), positions
begin again with each text, and each text is pooled by itself. So rows are hardly padded, and all have one length.
https://arxiv.org/abs/2107.02027 (Krell et al., "Efficient Sequence Packing without Cross-contamination")
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from corewise.common.errors import SourceError
from corewise.common.references import guard
from corewise.source.exported import Flat
from corewise.source.pooling import TextVectors, Way
from corewise.source.transformers_models import PADDED_POSITIONS

PACKABLE: set[Way] = {"mean", "cls", "last", "weighted", "sqrt"}
"""All but the maximum, which would need the token vectors once more for each text."""
SAME = 1e-4
"""How far apart a text's vectors from both programs may be, as a share of the norm of the longest vector."""


class PackedVectors(nn.Module):
    """A ``TextVectors`` on packed rows."""

    def __init__(self, model: TextVectors, texts: int, *, adds_mask: bool) -> None:
        """``texts`` is the most that a row has; with ``adds_mask`` the mask is added to attention's scores."""
        super().__init__()
        self.adds_mask = adds_mask
        self.encoder, self.after = model.encoder, model.after
        self.poolings = model.poolings
        self.texts = texts
        config = model.encoder.config
        is_padded = getattr(config, "model_type", "") in PADDED_POSITIONS
        self.first_position = (getattr(config, "pad_token_id", None) or 0) + 1 if is_padded else 0

    def forward(self, input_ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        """Int64 (N, tokens) each, ``segments`` from 1 on and 0 for padding -> vectors (N, texts, D)."""
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
        if self.adds_mask:
            mask = (~mask).to(torch.float32) * torch.finfo(torch.float32).min
        position_ids = positions + self.first_position
        # Also in bf16, where what is made of integers is float32 as it was exported.
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask, position_ids=position_ids)[0].to(torch.float32)
        numbers = torch.arange(1, self.texts + 1, device=segments.device)
        member = (segments[:, None, :] == numbers[None, :, None]).to(hidden.dtype)
        pooled = [_pool(hidden, member, positions[:, None].to(hidden.dtype), way) for way in self.poolings]
        vectors: Tensor = self.after(pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1))
        return vectors


def _pool(hidden: Tensor, member: Tensor, positions: Tensor, way: Way) -> Tensor:
    """Token vectors (N, tokens, D), and which text each is of (N, texts, tokens) -> (N, texts, D), as ``pooling.pool``.

    The product's weights are whole numbers, which int8 keeps exactly; the division comes after it.
    """
    count = member.sum(-1, keepdim=True).clamp(min=1)
    if way == "cls":
        return (member * (positions == 0)) @ hidden
    if way == "last":
        return (member * (positions == count - 1)) @ hidden
    if way == "weighted":
        weights = member * (positions + 1)
        return weights @ hidden / weights.sum(-1, keepdim=True).clamp(min=1)
    return member @ hidden / (count.sqrt() if way == "sqrt" else count)


def packable(model: nn.Module) -> TextVectors | None:
    """What was exported, if it pools token vectors in a way that packed rows can have."""
    inner = model.model if isinstance(model, Flat) else model
    return inner if isinstance(inner, TextVectors) and {*inner.poolings} <= PACKABLE else None


@torch.no_grad()
def packed_form(model: nn.Module, texts: int, row: Sequence[NDArray[np.int64]]) -> PackedVectors | None:
    """The module that answers packed rows as ``model`` answers texts alone; ``None`` if there is none.

    An architecture may ignore the positions or the mask, or mix neighbours in another way, such as by convolutions: the
    vectors of the texts in ``row``, in fp32, tell.

    Args:
        model: What was exported.
        texts: The most texts of a row.
        row: The inputs (``records.pipeline.PACKED_INPUTS``) of one row of at least two texts, int64 (tokens,) each.

    Returns:
        A module that takes the same, int64 (N, tokens) each, and gives float32 (N, texts, D).
    """
    inner = packable(model)
    if inner is None:
        return None
    ids, positions, segments = (torch.from_numpy(array)[None] for array in row)
    alone = [ids[:, segments[0] == number] for number in range(1, int(segments.max()) + 1)]
    expected = torch.cat([inner(one, torch.ones_like(one)) for one in alone])
    for adds_mask in (False, True):
        packed = PackedVectors(inner, texts, adds_mask=adds_mask).eval()
        try:
            with guard(SourceError, "the model does not take packed rows"):
                found = packed(ids, positions, segments)[0, : len(expected)]
        except SourceError:
            continue
        if (found - expected).norm(dim=-1).max() <= SAME * expected.norm(dim=-1).max():
            return packed
    return None
