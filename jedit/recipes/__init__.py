"""Complete runs from data to report, as the command line starts them."""
