"""The optimizer: Muon for matrices, AdamW for the rest, one learning rate schedule, clipping by the global norm."""
