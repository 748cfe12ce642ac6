"""What a step would cost on a GPU, from its machine code and a model: no GPU is needed."""
