"""What an edit of a language model will need of a device, told before it is made."""
