"""The paper's analysis, run: one row a sample on disk, then means with intervals and a verdict from the saved rows."""
