"""Change a trained model as if some of its training data had been different, without retraining."""

from fastif_ext.removal.classes import remove_class
from fastif_ext.removal.report import EditReport, RemovalReport, StepRecord
from fastif_ext.removal.rows import correct_labels, remove_rows
from fastif_ext.removal.search import Guard, Start, shortest_step

__all__ = [
    "EditReport",
    "Guard",
    "RemovalReport",
    "Start",
    "StepRecord",
    "correct_labels",
    "remove_class",
    "remove_rows",
    "shortest_step",
]
