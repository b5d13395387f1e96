"""The fast path: a decoder of merged weights, a round without the host, and CUDA graphs of it."""
