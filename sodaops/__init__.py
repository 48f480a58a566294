"""SoDaOps trains, deploys and monitors text classifiers."""
