"""Methods that keep what is known while a model learns on."""
