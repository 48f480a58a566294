"""Errors in the labels of a table: rows whose label other evidence contradicts."""
