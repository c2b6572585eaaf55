"""Experiments as lists of commands, each of which can be run by hand."""
