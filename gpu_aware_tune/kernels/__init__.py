"""What is done to one kernel: its schedules, search space, traces and packed weights."""
