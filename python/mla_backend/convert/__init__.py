"""From a checkpoint to a GGUF file: names, transforms, quantization, writing."""
