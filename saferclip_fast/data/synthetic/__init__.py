"""Data sets made on the spot: drawn scenes, and signs over real photographs. Their hazards are harmless drawings."""

from . import photos, scenes

__all__ = ["photos", "scenes"]
