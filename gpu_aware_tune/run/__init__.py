"""One run over one or more models: its session, and each model's part of it."""
