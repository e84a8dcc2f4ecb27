"""A run as people read it: one HTML page, PNG files, and the histories they are drawn from."""
