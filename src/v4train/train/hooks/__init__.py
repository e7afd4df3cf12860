"""What watches a run, one file each: metrics, evaluation, checkpoints, progress."""
