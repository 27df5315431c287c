"""Tests against other implementations, which are heavy: they run in an environment of their own (``make test-peers``)."""
