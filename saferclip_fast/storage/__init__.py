"""Files on disk: whole or absent, filled in row by row, read memory-mapped."""
