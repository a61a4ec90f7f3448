"""``tensor_parallel``: only the decoder layer's name; tensor parallelism is not implemented."""
