"""The command line: `v4train <command>`."""
