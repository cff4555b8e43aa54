"""The engine: a frozen decoder with LoRA as an explicit forward and backward pass over packed rows."""
