"""Numbers that judge any params, whichever method made them."""
