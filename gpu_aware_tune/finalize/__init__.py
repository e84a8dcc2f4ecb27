"""Records -> verified libraries: re-measured, selected, compiled, checked."""
