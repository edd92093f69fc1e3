"""The sentence encoder all-MiniLM-L6-v2 on the STS-B pairs (``COREWISE_DATA`` or ``../shared/data``).

    corewise optimize examples/minilm.py:build --samples examples/minilm.py:samples \
        --metric examples/minilm.py:spearman --max-drop 0.01 -o minilm.cw
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, logging
from weights import data_folder

from corewise.samples import Samples, from_python

PADDED_TOKENS = 64
"""More than any sentence of STS-B has (53)."""


class SentenceEncoder(nn.Module):
    """BERT, the mean of its last hidden states over the mask, L2-normalised."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Int64 (N, tokens), twice -> embeddings (N, 384)."""
        kinds = torch.zeros_like(input_ids)
        hidden = self.bert(input_ids, attention_mask, token_type_ids=kinds).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def encoder_folder() -> Path:
    """Where the configuration, the tokenizer and the weights are."""
    return data_folder() / "weights" / "all-MiniLM-L6-v2"


def build() -> nn.Module:
    """The encoder, fp32, in eval mode; keywords input_ids, attention_mask int64 (N, tokens) -> embeddings (N, 384)."""
    # The folder holds a pooler that the encoder does not need, which transformers would report at length.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"local_files_only": True, "dtype": torch.float32, "attn_implementation": "sdpa"}
    return SentenceEncoder(BertModel.from_pretrained(encoder_folder(), add_pooling_layer=False, **options)).eval()


def samples() -> Samples:
    """All 3000 sentences padded to one length: neighbours are a pair, and its group."""
    return _samples(padding="max_length", max_length=PADDED_TOKENS)


def samples_ragged(pairs: int | None = None) -> Samples:
    """The same, or the first pairs of them, each sentence with its own length."""
    return _samples(pairs)


def padded(tokens: int, pairs: int) -> Samples:
    """The first pairs of sentences, padded to so many tokens."""
    return _samples(pairs, padding="max_length", max_length=tokens)


def _samples(first: int | None = None, **padding: Any) -> Samples:
    with open(data_folder() / "stsb.csv", newline="", encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))[:first]
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    sentences = [pair[key] for pair in pairs for key in ("sentence1", "sentence2")]
    tokens = tokenizer(sentences, truncation=False, return_token_type_ids=False, **padding)
    rows = [
        ({"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)}, float(pair["score"]))
        for ids, mask, pair in zip(tokens["input_ids"], tokens["attention_mask"], np.repeat(pairs, 2), strict=True)
    ]
    return from_python(rows, groups=np.repeat(np.arange(len(pairs)), 2), source="stsb.csv")


def spearman(outputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """Spearman's rank correlation of the pairs' cosines with their scores.

    ``outputs`` (2P, D): neighbours are a pair; ``labels`` (2P,): each pair's score, twice. NaN where all are equal.
    """
    left, right = outputs[::2], outputs[1::2]
    cosines = (left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(_ranks(cosines), _ranks(labels[::2]))[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 0, equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    means = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(means[places])
