"""Which number format each role of an array has."""
