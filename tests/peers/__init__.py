"""Tests against other implementations, too heavy for the base environment (``make test-peers``)."""
