"""What every process of a run has: its ranks, its stop signals, the precision it computes in."""
