"""What every layer may use: shape letters, parameter declarations."""
