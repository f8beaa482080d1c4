"""What runs write and read back: files that are whole or not there, result folders, tables."""
