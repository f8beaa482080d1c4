"""Task x pruner x model: rows on disk as they come, a summary at the end, tables of many runs."""
