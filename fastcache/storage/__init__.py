"""What is remembered from step to step."""
