"""The embedded default: a small world of controlled sentiment that needs no download."""
