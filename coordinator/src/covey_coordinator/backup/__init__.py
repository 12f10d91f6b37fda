"""`covey backup` and `covey restore`: all a coordinator needs to go on elsewhere, in one file. docs/backup.md."""
