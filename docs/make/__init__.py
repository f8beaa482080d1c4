"""Pages whose figures come from files: ``python -m docs.make.performance`` and ``.results``, from the root."""
