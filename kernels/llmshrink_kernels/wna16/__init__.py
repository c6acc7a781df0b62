"""y = x W^T with W in 2, 3, 4 or 8-bit grouped integers and x in fp16 or bf16."""
