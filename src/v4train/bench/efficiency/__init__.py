"""How much training compute the V4 recipe saves against what it replaced, ingredient by ingredient."""
