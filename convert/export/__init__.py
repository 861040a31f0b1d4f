"""Writes the foreign layouts: the import side's tables and configurations, read backwards."""
