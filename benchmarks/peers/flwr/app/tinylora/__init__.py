"""A Flower app that fine-tunes a tiny Llama with LoRA, as Flower's own examples are built."""
