"""Extensions of SoDaOps, as a user's own package has them."""
