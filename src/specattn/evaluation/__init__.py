"""What sparse reading costs in quality, measured against the same model reading everything."""
