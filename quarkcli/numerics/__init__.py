"""Computes with number formats: scales, packing, fake quantization, the GPTQ column loop. Tensors in, tensors out."""
