"""The slot engine: many requests in one packed forward per step, each with its own adapter or none."""
