"""Activations of a language model: what is read, how it is cut into units, and the rows that a unit gives."""

from trainer.extraction.documents import Documents, open_documents, unit_name
from trainer.extraction.identity import identity
from trainer.extraction.making import Live, open_live
from trainer.extraction.rows import Clock, Extractor, Rows
from trainer.extraction.settings import COMPUTE, OUTSIDE, Settings
from trainer.extraction.windows import Windows

__all__ = [
    "COMPUTE",
    "OUTSIDE",
    "Clock",
    "Documents",
    "Extractor",
    "Live",
    "Rows",
    "Settings",
    "Windows",
    "identity",
    "open_documents",
    "open_live",
    "unit_name",
]
