"""What a person sees: words, pictures, a progress line."""
