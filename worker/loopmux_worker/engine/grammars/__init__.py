"""Guaranteed output: a request's tokens are held to a grammar, so that calls and JSON come out as was asked for."""
