"""One file a section: each turns the runs of its kind into tables and figures."""
