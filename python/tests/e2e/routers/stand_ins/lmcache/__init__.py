"""Stands in for LMCache: the two modules that its example proxy imports, which has no use for the rest."""
