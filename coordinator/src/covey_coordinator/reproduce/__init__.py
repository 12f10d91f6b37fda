"""`covey reproduce`: published experiments re-run, the paper's numbers and ours side by side, and what of it holds."""
