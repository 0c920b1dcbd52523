"""The launcher: builds model environments and keeps the workers of one host alive."""
