"""Pure array maths: losses, positions, sampling, matrix products. No modules, no configs."""
