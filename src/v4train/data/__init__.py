"""From documents on disk to fixed-shape batches, where the data position is a pure function of the step."""
