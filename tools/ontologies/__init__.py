"""Hierarchies of concepts that others made, as concepts with words."""
