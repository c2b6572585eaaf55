"""The dictionary: form, banks with their gate, normalisation, and the names of its units. Knows no parallelism."""

from trainer.dictionary.bank import BankWeights, OutputBias, SlotBank, joined
from trainer.dictionary.buffers import Joined
from trainer.dictionary.concept_dictionary import ConceptDictionary, initial_share
from trainer.dictionary.form import ChosenForm, DictionaryConfig, DictionaryForm
from trainer.dictionary.gate import GATES, apply_gate, steps
from trainer.dictionary.units import bank_number, bank_unit

__all__ = [
    "GATES",
    "BankWeights",
    "ChosenForm",
    "ConceptDictionary",
    "DictionaryConfig",
    "DictionaryForm",
    "Joined",
    "OutputBias",
    "SlotBank",
    "apply_gate",
    "bank_number",
    "bank_unit",
    "initial_share",
    "joined",
    "steps",
]
