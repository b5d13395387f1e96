"""One file an operation: the fp32 reference in PyTorch, and where there is one its GPU kernel with the same signature."""
