"""Distributed trainer for concept-aligned sparse autoencoders (AlignSAE, arXiv 2512.02004)."""
