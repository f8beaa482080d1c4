"""vlmflow inside other programs; nobody here imports them before they call."""
