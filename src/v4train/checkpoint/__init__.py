"""Checkpoints: one atomic directory per step, written in the background, restored onto any mesh."""
