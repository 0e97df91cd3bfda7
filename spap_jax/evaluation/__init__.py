"""What a model is worth: perplexity, generated text, speed."""
