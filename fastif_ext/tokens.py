"""Tokens as rows: what a sampler drew from a model of sequences, as a data set and a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fastif_ext.data import call, count
from fastif_ext.stream import IGNORED


class TokenRows(Dataset[Any]):
    """The labelled tokens of a data set of sequences, one row each: ((inputs, position), label).

    Row numbers are those of a pass over the sequences: extract and every sampler's from_loader,
    with a model that gives logits [b, T, Y], take the labelled tokens as rows, in order. So a
    sampler drawn from sequences, where the model runs once for all tokens of each, chooses rows
    here, and curvature is taken with ``TokenModel(model)`` on them.

    Labels belong to the logits at the same place: for a language model they are the inputs moved
    by one, ``labels[t] = ids[t + 1]``, with -100 at the last token and wherever there is none.

    Args:
        sequences: a map-style data set of (inputs, labels), labels int64 [T], -100 for a token
            without one. T may differ. It is read once, for its labels.

    Raises:
        TypeError: no length. ValueError: labels that are not [T].

    Example:
        >>> import torch, fastif_ext as fi
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> ids = torch.randint(50, (8, 6))
        >>> labels = torch.cat([ids[:, 1:], torch.full((8, 1), -100)], 1)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 4), torch.nn.Linear(4, 50))
        >>> data = TensorDataset(ids, labels)
        >>> sampler = fi.CurvatureSampler.from_loader(model, DataLoader(data, 4), 9, progress=False)
        >>> rows = fi.TokenRows(data)
        >>> drawn = DataLoader(rows, sampler=sampler)
        >>> H = fi.GaussNewton(
        ...     fi.TokenModel(model), drawn, weights=sampler.weights, params=["model.1.weight"]
        ... )
        >>> len(rows) == sampler.n, H.dim
        (True, 200)
    """

    def __init__(self, sequences: Dataset[Any]) -> None:
        self.sequences = sequences
        found = []
        for i, labels in enumerate(_labels(sequences)):
            if labels.dim() != 1:
                raise ValueError(
                    f"TokenRows: the labels of sequence {i} have shape {list(labels.shape)}; they "
                    f"must be [T], one for each token, with {IGNORED} where it has none"
                )
            places = (labels != IGNORED).nonzero()[:, 0]
            found.append(torch.stack([torch.full_like(places, i), places]))
        self._places = torch.cat(found, 1) if found else torch.empty(2, 0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._places.shape[1]

    def __getitem__(self, row: int) -> tuple[tuple[Any, Tensor], Tensor]:
        sequence, position = self._places[:, row]
        inputs, labels = self.sequences[int(sequence)]
        return (inputs, position), torch.as_tensor(labels)[position]


class TokenModel(nn.Module):
    """A model of sequences, as a model of the rows of TokenRows: (inputs, position) to logits.

    Args:
        model: maps inputs to logits [b, T, Y], a tensor or an object with ``.logits``. Its
            parameters are this module's, under the name ``model.``.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model = torch.nn.Embedding(50, 7)
        >>> fi.TokenModel(model)((torch.zeros(3, 6, dtype=torch.int64), torch.arange(3))).shape
        torch.Size([3, 7])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Any, Tensor]) -> Tensor:
        """Logits [b, Y] at the positions int64 [b]."""
        sequences, position = inputs
        output = call(self.model, sequences)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[torch.arange(len(logits), device=logits.device), position]


def _labels(sequences: Dataset[Any]) -> Any:
    if type(sequences) is TensorDataset:
        return sequences.tensors[1]
    return (torch.as_tensor(sequences[i][1]) for i in range(count(sequences)))
