"""Measurements: each prints one JSON object that says what was measured, on what, and how busy the machine was."""
