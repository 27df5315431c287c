"""A model repository whose engine says given texts at once: what is left to measure and to test is the text layer."""
