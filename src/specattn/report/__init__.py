"""Reports: what runs measured, as one page for people."""
