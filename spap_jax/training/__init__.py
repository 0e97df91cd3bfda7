"""Recovery training, for those who want it: LoRA or all weights, on the text or towards the dense model."""
