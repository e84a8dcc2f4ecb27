"""The record store: every measurement, in SQLite; its only reader and writer."""
