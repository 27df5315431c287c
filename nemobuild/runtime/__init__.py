"""The text side of a served model: everything between a request's fields and the engine's tokens.

This package is carried byte for byte into every emitted model repository and runs inside Triton. It uses
the standard library, NumPy, tokenizers and jinja2 only, imports relatively, and knows nothing of Triton:
the short ``model.py`` adapters translate tensors to and from the plain values used here.
"""
