"""See where visual information flows in a multimodal LLM, and prune the image tokens it no longer needs."""
