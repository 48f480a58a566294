"""A head that weighs the tokens with one attention query."""

import torch
from torch import Tensor, nn


class AttentionHead(nn.Module):
    """Logits from the mean embedding and from tokens weighted by attention."""

    def __init__(self, hidden_size: int, n_labels: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.query = nn.Linear(hidden_size, 1)
        self.output = nn.Linear(2 * hidden_size, n_labels)

    def forward(self, embeddings: Tensor, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        scores = self.query(hidden_states) / self.temperature  # [n_examples, n_tokens, 1]
        weights = scores.masked_fill(attention_mask.unsqueeze(-1) == 0, -1e9).softmax(1)
        return self.output(torch.cat([embeddings, (weights * hidden_states).sum(1)], -1))
