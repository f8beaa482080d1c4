"""How fast: time and memory measured side by side, and random models to measure on."""
