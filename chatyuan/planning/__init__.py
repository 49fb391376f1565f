"""What a run needs before it is started: memory, time, money, meshes; and how its loss will scale.

Everything here follows from shapes and sizes: nothing is compiled, and no device is touched.
"""
