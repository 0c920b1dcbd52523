"""Guaranteed output: a request's tokens are held to a grammar, so that its calls and its JSON are what was asked for."""
