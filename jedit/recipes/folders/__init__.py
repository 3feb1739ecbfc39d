"""A model of a folder that forgets rows: what is edited, by which method, and what is written."""
