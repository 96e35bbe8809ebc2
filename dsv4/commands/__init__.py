"""The commands, a file each; options, tables, progress and exit codes beside them."""
