"""Figures from results; nothing here computes one, and no torch is imported."""
