"""Optional recovery training: of LoRA updates or all weights, on text or towards the dense model's predictions."""
