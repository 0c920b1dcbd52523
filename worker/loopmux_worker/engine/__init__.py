"""Engines: what turns a request into tokens. ``base`` is the interface; ``open_engine`` chooses one."""
