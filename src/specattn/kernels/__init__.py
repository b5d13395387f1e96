"""One file an operation: its fp32 reference in PyTorch and, where there is one, its GPU kernel."""
