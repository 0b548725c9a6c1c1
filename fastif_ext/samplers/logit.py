"""The paper's logit sampler."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import ops
from fastif_ext.device import with_kernels
from fastif_ext.samplers.base import (
    SubsetSampler,
    check_labels,
    check_logits,
    require_labels,
    row_blocks,
)
from fastif_ext.samplers.drive import drive
from fastif_ext.samplers.fold import Fold
from fastif_ext.stream import ExtractedBatch

LABEL_ROWS = 2**14  # of which the classes are found and drawn for at a time, with labels


class LogitSampler(SubsetSampler):
    """The paper's logit sampler: for each class y, k rows drawn by their probability of y.

    Row i is drawn for class y with probability proportional to softmax(logits_i)_y, over all rows
    or over those labelled y. A row drawn for two classes stands in the subset twice. Weights are
    1/m with m the number of rows drawn, k for each class, as in the paper.

    Args:
        logits: [n, Y].
        samples_per_class: k, rows for each class.
        replacement: draw with replacement within a class.
        labels: where given, int64 [n], class y draws from the rows labelled y only.
        classes: which classes draw. "all"; "occurring", those that labels name, of which one with
            fewer than k rows gives all it has (for the vocabulary of a language model); or a tensor
            of their numbers, for example ``labels.unique()`` to draw for these over all rows.
        seed: the same seed draws the same rows, whatever the batches or threads.

    Raises:
        ValueError: NaN logits, a class with fewer than k rows, labels or classes that do not fit.

    Example:
        >>> import torch, fastif_ext as fi
        >>> len(fi.LogitSampler(torch.randn(100, 5), 3, seed=0))
        15
    """

    def __init__(
        self,
        logits: Tensor,
        samples_per_class: int,
        *,
        replacement: bool = False,
        labels: Tensor | None = None,
        classes: str | Tensor = "all",
        seed: int = 0,
    ) -> None:
        by_label = labels is not None
        fold = LogitFold(
            samples_per_class,
            replacement=replacement,
            by_label=by_label,
            classes=classes,
            seed=seed,
        )
        fold.update(ExtractedBatch(0, logits, None, labels))
        super().__init__(*fold.subset())

    @classmethod
    def from_loader(
        cls,
        model: nn.Module,
        loader: DataLoader[Any],
        samples_per_class: int,
        *,
        replacement: bool = False,
        by_label: bool = False,
        classes: str | Tensor = "all",
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = True,
        state: str | os.PathLike[str] | None = None,
    ) -> LogitSampler:
        """The same sampler in one pass over a loader, in O(k) memory for each class that draws.

        It draws exactly the rows that ``LogitSampler(all logits, ...)`` would.

        Args:
            model: maps inputs to logits; see fastif_ext.extract.
            loader: a DataLoader that does not shuffle.
            samples_per_class: rows for each class.
            replacement: draw with replacement within a class.
            by_label: class y draws from the rows labelled y only.
            classes: "all", "occurring" (with by_label=True), or a tensor of class numbers.
            seed: the same seed draws the same rows.
            device: where the model runs.
            progress: show a progress bar.
            state: a file that keeps what was read, to go on after an interruption; see
                fastif_ext.samplers.drive.
        """
        fold = LogitFold(
            samples_per_class,
            replacement=replacement,
            by_label=by_label,
            classes=classes,
            seed=seed,
        )
        sampler: LogitSampler = drive(
            fold, model, loader, device=device, progress=progress, state=state
        )
        return sampler


class LogitFold(Fold):
    """The k best rows of each class that draws: O(k) memory for each, however many rows.

    by_label, one row stands in one class, so that lines of a draw may share their random numbers:
    each class draws from a line of the weights of its own rows, and no n x Y tensor is made.
    """

    sampler = LogitSampler

    def __init__(
        self,
        samples_per_class: int,
        *,
        replacement: bool = False,
        by_label: bool = False,
        classes: str | Tensor = "all",
        seed: int = 0,
    ) -> None:
        if samples_per_class < 1:
            raise ValueError(
                f"LogitSampler: samples_per_class must be at least 1, got {samples_per_class}"
            )
        self._chosen = _check_classes(classes, by_label)
        super().__init__(
            samples_per_class=samples_per_class,
            replacement=replacement,
            by_label=by_label,
            classes=classes if isinstance(classes, str) else self._chosen.tolist(),
            seed=seed,
        )
        self.k, self.by_label, self.classes = samples_per_class, by_label, classes
        self._options: dict[str, Any] = {"replacement": replacement, "seed": seed}
        self._width = 0  # Y
        self._lines = torch.empty(0, dtype=torch.int64)  # the classes that have drawn, ascending
        self._sample: ops.ClassSample | None = None  # a line for each

    def _update(self, batch: ExtractedBatch) -> None:
        logits = check_logits(self.name, with_kernels(batch.logits), first_row=batch.row_offset)
        n, classes = logits.shape
        if self._width not in (0, classes):
            raise ValueError(
                f"LogitSampler: logits have {classes} columns from row {batch.row_offset} on, and "
                f"had {self._width} before; all batches must be alike"
            )
        if len(self._chosen) and int(self._chosen[-1]) >= classes:
            raise ValueError(
                f"LogitSampler: classes must be between 0 and {classes - 1}, the columns of "
                f"logits; got {int(self._chosen[-1])}"
            )
        if self.by_label:
            labels = require_labels(self.name, batch.labels)
            labels = check_labels(self.name, labels, n=n, classes=classes)
            blocks = [slice(i, i + LABEL_ROWS) for i in range(0, n, LABEL_ROWS)]
            samples = [
                self._by_label(logits[rows], labels[rows], batch.row_offset + rows.start)
                for rows in blocks
            ]
            for lines, sample in samples:  # all or none
                self._add(lines, sample)
        else:
            sample = ops.class_multinomial(
                logits, self.k, row_offset=batch.row_offset, **self._options
            )
            if isinstance(self.classes, str):
                self._add(torch.arange(classes), sample)
            else:
                self._add(self._chosen, _lines(sample, self._chosen))
        self._width = classes

    def _by_label(
        self, logits: Tensor, labels: Tensor, row_offset: int
    ) -> tuple[Tensor, ops.ClassSample]:
        """The classes of some rows and the sample of each."""
        own = labels.to(logits.device)
        p = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for rows in row_blocks(logits):
            probs = logits[rows].softmax(1, dtype=torch.float32)
            p[rows] = probs.gather(1, own[rows, None])[:, 0].nan_to_num_(0.0)  # of nothing but -inf
        classes = labels.unique()
        if not isinstance(self.classes, str):
            classes = classes[torch.isin(classes, self._chosen)]
        samples = [
            ops.bottom_k(
                torch.where(own == y, p, 0.0), self.k, row_offset=row_offset, **self._options
            )
            for y in classes.tolist()
        ]
        if not samples:
            return classes, _nothing(0, self.k, p.device)
        return classes, ops.ClassSample(
            torch.stack([sample.rows for sample in samples]),
            torch.stack([sample.log_keys for sample in samples]),
            torch.stack([sample.log_threshold for sample in samples]),
            samples[0].skipped,
        )

    def _add(self, lines: Tensor, sample: ops.ClassSample) -> None:
        """Merge the samples of these classes into those that are there."""
        if self._sample is None:
            self._lines, self._sample = lines, sample
            return
        sample = _moved(sample, self._sample.rows.device)
        if not torch.equal(lines, self._lines):
            both = torch.cat([self._lines, lines]).unique()
            sample = _spread(sample, torch.searchsorted(both, lines), len(both))
            self._sample = _spread(self._sample, torch.searchsorted(both, self._lines), len(both))
            self._lines = both
        self._sample = ops.merge_samples(self._sample, sample)

    def _merge(self, other: Any) -> None:
        self._add(other._lines, other._sample)
        self._width = other._width

    def _state(self) -> dict[str, Any]:
        if self._sample is None:
            return {}
        return {
            "width": self._width,
            "lines": self._lines,
            **_moved(self._sample, "cpu")._asdict(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        if not state:
            self._sample = None
            return
        self._width, self._lines = state["width"], state["lines"]
        self._sample = ops.ClassSample(*(state[name] for name in ops.ClassSample._fields))

    def _draw(self) -> tuple[Tensor, None]:
        assert self._sample is not None
        rows = self._sample.rows
        have = (rows >= 0).sum(1).cpu()
        if self.classes != "occurring":
            wanted = self._chosen if len(self._chosen) else torch.arange(self._width)
            found = torch.zeros(self._width, dtype=torch.int64)
            found[self._lines] = have
            short = (found[wanted] < self.k).nonzero()[:, 0].tolist()
            if short:
                y = int(wanted[short[0]])
                raise ValueError(
                    f"LogitSampler: samples_per_class = {self.k}, but class {y} has only "
                    f"{int(found[y])} rows of positive probability; lower it, use replacement=True "
                    f"or, with labels, classes='occurring'"
                )
        elif not have.sum():
            raise ValueError("LogitSampler: no row has a positive probability of its label")
        return rows[rows >= 0], None


def _check_classes(classes: str | Tensor, by_label: bool) -> Tensor:
    """The chosen classes, ascending; none where there is no choice."""
    if isinstance(classes, Tensor):
        chosen = check_labels("LogitSampler", classes).unique()
        if not len(chosen) or chosen[0] < 0:
            raise ValueError(
                f"LogitSampler: classes must be class numbers from 0, got {chosen.tolist()[:5]}"
            )
        return chosen
    if classes not in ("all", "occurring"):
        raise ValueError(
            f"LogitSampler: classes must be 'all', 'occurring' or a tensor of class numbers, got "
            f"{classes!r}"
        )
    if classes == "occurring" and not by_label:
        raise ValueError(
            "LogitSampler: classes='occurring' are those of the labels, so it needs labels= (of a "
            "loader: by_label=True); to draw for them over all rows pass classes=labels.unique()"
        )
    return torch.empty(0, dtype=torch.int64)


def _lines(sample: ops.ClassSample, lines: Tensor) -> ops.ClassSample:
    at = lines.to(sample.rows.device)
    rows, log_keys, log_threshold = (part[at] for part in sample[:3])
    return ops.ClassSample(rows, log_keys, log_threshold, sample.skipped)


def _nothing(lines: int, k: int, device: torch.device) -> ops.ClassSample:
    """The sample of no rows."""
    return ops.ClassSample(
        torch.full((lines, k), -1, device=device),
        torch.full((lines, k), -torch.inf, dtype=torch.float32, device=device),
        torch.full((lines,), -torch.inf, dtype=torch.float32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def _spread(sample: ops.ClassSample, at: Tensor, lines: int) -> ops.ClassSample:
    """The lines of a sample at other places among more of them, which have no rows."""
    at = at.to(sample.rows.device)
    wide = _nothing(lines, sample.rows.shape[1], sample.rows.device)
    for part, given in zip(wide[:3], sample[:3], strict=True):
        part[at] = given
    return wide._replace(skipped=sample.skipped)


def _moved(sample: ops.ClassSample, device: torch.device | str) -> ops.ClassSample:
    return ops.ClassSample(*(t.to(device) for t in sample))
