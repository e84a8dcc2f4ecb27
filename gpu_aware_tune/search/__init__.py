"""The search stage: candidates, trials and where they go."""
