"""Readers of quadruplets, one format a file."""
