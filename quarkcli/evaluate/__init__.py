"""How much was lost: perplexity, KL and top-1 agreement, from the written files."""
