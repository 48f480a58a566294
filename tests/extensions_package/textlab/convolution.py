"""An encoder: one convolution over the embeddings of the tokens."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class ConvolutionEncoder(nn.Module):
    """Takes a Hugging Face encoder's arguments, and returns an object with ``last_hidden_state``."""

    def __init__(self, vocab_size: int, hidden_size: int = 32, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.embeddings = nn.Embedding(vocab_size, hidden_size)
        self.convolution = nn.Conv1d(hidden_size, hidden_size, kernel_size=3, padding=1)
        self.activation = activation or nn.GELU()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        embedded = self.embeddings(input_ids) * attention_mask.unsqueeze(-1)  # padding is 0, as beyond the text's ends
        return SimpleNamespace(last_hidden_state=self.activation(self.convolution(embedded.mT).mT))
