"""Recipes: how the things were made that the package ships."""
