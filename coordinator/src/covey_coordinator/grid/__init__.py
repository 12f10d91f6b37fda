"""`covey grid`: rules against attacks on a small real data set, and the heat map of what is left of the accuracy."""
