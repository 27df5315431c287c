"""nemobuild: from Hugging Face weights of Nemotron models to an endpoint that serves them."""

__version__ = "0.1.0"
