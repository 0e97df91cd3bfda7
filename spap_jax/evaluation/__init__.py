"""What a model is worth: perplexity, divergence from another, generated text, speed."""
