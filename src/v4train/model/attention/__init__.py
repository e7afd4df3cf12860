"""The attention kinds, one file each, and the projections they share."""
