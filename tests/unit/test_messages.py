"""A few whole messages, word by word, as examples of the house style: place, value, what is allowed, how to fix it.

All other tests of errors assert the class, the key or file that a message names, and the exit code.
"""

import pytest

from tests.conftest import make_rows, table


@pytest.mark.parametrize(("arguments", "message"), [
    (
        ["train", "optim.lrr=1"],
        "ConfigError: optim.lrr is not a key (did you mean lr?); optim has: optimizer, scheduler, lr, head_lr, "
        "weight_decay, layer_decay, frozen_layers, batch_tokens, batch_texts, vote_weight.\n",
    ),
    (
        ["train", "model=tinny"],
        "ConfigError: model=tinny: no such option (did you mean tiny?); model has: distilbert, minilm, mpnet, roberta_twitter, "
        "tiny, or set model.name_or_path to a hub name or a folder.\n",
    ),
    (
        ["train", "optim.lr=fast", "seed=x"],
        "ConfigError: 2 faults in the configuration:\n- seed='x': expected a valid integer.\n"
        "- optim.lr='fast': expected a valid number.\n",
    ),
    (
        ["preprocess", "data=csv", "data.path=reviews.csv", "data.label_column=lable"],
        "DataError: reviews.csv: no column lable (did you mean label?); the table has text, label. Set "
        "data.label_column=NAME.\n",
    ),
    (
        ["evaluate", "outputs/bundle"],
        "BundleError: outputs/bundle: no bundle.json; expected a folder that training wrote (RUN/bundle).\n",
    ),
    (
        ["promote", "challenger"],
        "RegistryError: challenger: registry has none yet; add a version with `sodaops register BUNDLE`.\n",
    ),
])  # fmt: skip
def test_messages(run, write, arguments, message):
    write("reviews.csv", table(make_rows()))
    code, _, err = run(*arguments)
    assert (code, err) == (2, message)
