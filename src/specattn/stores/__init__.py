"""Side stores: what is derived from the keys and kept beside them, page by page, with no trace of rejected tokens."""
