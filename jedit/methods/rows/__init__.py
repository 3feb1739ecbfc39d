"""The rows of the catalogue, by what kind of method they are."""
