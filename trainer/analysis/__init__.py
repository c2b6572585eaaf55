"""Reads what was trained: evaluation, interventions on a language model, results of a run.

Training imports nothing from here.
"""
