"""Training: state, step, loop, optimizers and schedules. The loss arrives as a function."""
