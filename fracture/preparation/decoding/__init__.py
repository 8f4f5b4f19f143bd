"""Decode a file to one grey image: which formats, how grey is made of them, and what is refused."""
