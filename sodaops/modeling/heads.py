"""Classification heads (conf/head).

A head is a ``torch.nn.Module`` whose constructor takes ``hidden_size``, the width of an embedding, and ``n_labels``. Its
``forward`` takes embeddings after dropout, float [n_examples, hidden_size], and returns logits, float [n_examples, n_labels].
Arguments of these names, if it has them, are ``hidden_states``, float [n_examples, n_tokens, hidden_size], and
``attention_mask``, int64 [n_examples, n_tokens], 0 for padding, which must not change the logits; padding may stand between
the windows of a long text.
"""

from torch import Tensor, nn


class LinearHead(nn.Linear):
    """One linear layer."""

    def __init__(self, hidden_size: int, n_labels: int) -> None:
        super().__init__(hidden_size, n_labels)


class MLPHead(nn.Module):
    """Two linear layers, with GELU and dropout between them; ``width`` is that of the layer between."""

    def __init__(self, hidden_size: int, n_labels: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, n_labels))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits, float [n_examples, n_labels], of embeddings, float [n_examples, hidden_size]."""
        return self.layers(embeddings)
