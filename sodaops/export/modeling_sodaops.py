"""A classifier of SoDaOps for transformers. An export contains a copy of this file and of what it imports from sodaops."""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from sodaops.modeling.heads import LinearHead, MLPHead
from sodaops.text.policies import POLICIES

HEADS = {"LinearHead": LinearHead, "MLPHead": MLPHead}


class SodaOpsConfig(PreTrainedConfig):
    """``encoder``: the encoder's configuration; ``head``: its class and arguments; ``pooling``: mean or cls."""

    model_type = "sodaops"


class SodaOpsClassifier(PreTrainedModel):
    """Encoder, pooling and head."""

    config_class = SodaOpsConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = AutoConfig.for_model(**config.encoder)
        try:
            self.encoder = AutoModel.from_config(settings, add_pooling_layer=False)
        except TypeError:  # it has no pooler
            self.encoder = AutoModel.from_config(settings)
        head, arguments = HEADS[config.head["class"]], config.head["arguments"]
        self.head = head(settings.hidden_size, config.num_labels, **arguments)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits, float [n_texts, n_labels], of a padded batch, int64 [n_texts, n_tokens]."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}  # of pairs
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [n_texts, n_tokens, 1]
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.head(hidden[:, 0] if self.config.pooling == "cls" else mean))


class SodaOpsTokenizer(PreTrainedTokenizerFast):
    """Cleans texts by the policy ``cleaning`` of tokenizer_config.json, if there is one, and cuts them at the token limit.

    It has no constructor: with one, transformers would build another tokenizer than that of tokenizer.json.
    """

    def __call__(self, text: Any = None, text_pair: Any = None, *args: Any, truncation: Any = True, **kwargs: Any) -> Any:
        clean = POLICIES.get(self.init_kwargs["cleaning"], str)
        cleaned = [
            texts if texts is None else clean(texts) if isinstance(texts, str) else [clean(one) for one in texts]
            for texts in (text, text_pair)
        ]
        return super().__call__(*cleaned, *args, truncation=truncation, **kwargs)
