"""Methods that split a weight by whose inputs it serves."""
