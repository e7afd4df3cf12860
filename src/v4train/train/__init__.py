"""The trainer: state, loss, step, loop, and the wiring of all components."""
