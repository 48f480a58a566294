"""SoDaOps: from a table of labelled texts to a watched service, and back."""
