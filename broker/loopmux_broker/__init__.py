"""The broker: routes requests of clients to workers and their output back. It runs nothing itself."""
