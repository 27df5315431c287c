"""What a new version must pass before it is published: verification, prompts, quality and speed against the last."""
