"""The worker: one process that keeps a base model and its adapters loaded and generates."""
