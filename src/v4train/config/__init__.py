"""Configuration: the base class of all component configs, loading and dumping of YAML. Imports no jax."""
