"""`covey backup` and `covey restore`: everything a coordinator needs to go on elsewhere, in one file. docs/backup.md."""
