"""The processes of a run: ranks, stop signals, the precision they compute in."""
