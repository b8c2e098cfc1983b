"""The loss of a quantized model: perplexity, KL and top-1 agreement, from the written files."""
