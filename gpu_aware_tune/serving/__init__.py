"""Serving: one device's queues, scheduler and lanes (the engine), and front ends for it."""
