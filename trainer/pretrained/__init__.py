"""Dictionaries that others trained: read from their formats, kept in a folder of their own, and begun from.

SOURCE --open_source--> Source (raw weights, a few slots at a time) --write--> folder --Start / load--> dictionary
"""

from trainer.pretrained.calibration import Measured, calibrate, measure, sample
from trainer.pretrained.exporting import fold, gains, named, saelens_config, trainer_name, written
from trainer.pretrained.folder import Description, Imported, load, new_folder, refuse_existing, write
from trainer.pretrained.gating import Gated, fit_gate
from trainer.pretrained.locate import open_source
from trainer.pretrained.source import Facts, Source, rescale
from trainer.pretrained.start import Start, take_over
from trainer.pretrained.trained import Trained, read_trained

__all__ = [
    "Description",
    "Facts",
    "Gated",
    "Imported",
    "Measured",
    "Source",
    "Start",
    "Trained",
    "calibrate",
    "fit_gate",
    "fold",
    "gains",
    "load",
    "measure",
    "named",
    "new_folder",
    "open_source",
    "read_trained",
    "refuse_existing",
    "rescale",
    "saelens_config",
    "sample",
    "take_over",
    "trainer_name",
    "write",
    "written",
]
