"""Second-order statistics of linear sites: estimate them, solve with them, measure with them."""
