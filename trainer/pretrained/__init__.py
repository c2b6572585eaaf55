"""Dictionaries that others trained: read from their formats, kept in a folder of their own, and begun from.

SOURCE --open_source--> Source (raw weights, a few slots at a time) --write--> folder --Start / load--> dictionary
"""

from trainer.pretrained.calibration import Measured, calibrate, measure
from trainer.pretrained.exporting import fold, gains, named, saelens_config, trainer_name
from trainer.pretrained.folder import Description, Imported, load, write
from trainer.pretrained.locate import open_source
from trainer.pretrained.source import Facts, Source, rescale
from trainer.pretrained.start import Start, take_over
from trainer.pretrained.trained import Trained, read_trained

__all__ = [
    "Description",
    "Facts",
    "Imported",
    "Measured",
    "Source",
    "Start",
    "Trained",
    "calibrate",
    "fold",
    "gains",
    "load",
    "measure",
    "named",
    "open_source",
    "read_trained",
    "rescale",
    "saelens_config",
    "take_over",
    "trainer_name",
    "write",
]
