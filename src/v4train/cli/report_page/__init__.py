"""The parts of the training report: reading of runs, figures, charts, tables and the page that holds them."""
