"""Tables, console output and progress of the command line."""
