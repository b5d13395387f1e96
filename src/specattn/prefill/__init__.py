"""Prefill methods: which blocks of the causal attention over a prompt are computed."""
