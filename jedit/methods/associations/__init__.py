"""Methods that write facts into a layer as associations of keys and values."""
