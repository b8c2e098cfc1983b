"""Numbers: formats, scales, packing, fake quantization and the GPTQ column loop. Tensors in, tensors out."""
