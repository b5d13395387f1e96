"""Timings of kernels and of decoding, beside their peers; reported only if the results were checked."""
