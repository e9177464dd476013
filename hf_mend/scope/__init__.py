"""Scopes: at which tokens of a text an edit acts."""
